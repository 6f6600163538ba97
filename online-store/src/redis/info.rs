//! What a Redis says of itself: whether it can be a store, and what an operator should know.

use ::redis::{Cmd, FromRedisValue, Value};

use super::connection::Kind;
use crate::NodeReport;

/// Above this share of its memory a server is reported.
const MEMORY_SHARE_MAX: f64 = 0.85;

pub(super) fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    let value = |line: &'a str| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim());
    info.lines().find_map(value)
}

fn number(info: &str, name: &str) -> Option<u64> {
    field(info, name)?.parse().ok()
}

/// Why a server that says this of itself cannot be a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unfit {
    /// Not before somebody changes something.
    Refused(String),
    /// Not now: another node may have taken over.
    Replica,
}

/// Whether a server that says this of itself can be a store; else why not.
pub(super) fn check(info: &str, kind: Kind) -> Result<(), Unfit> {
    if let Some(what) = unfit(info, kind) {
        return Err(Unfit::Refused(what));
    }
    match (field(info, "role"), kind) {
        (Some("slave"), Kind::Cluster) => Err(Unfit::Replica),
        (Some("slave"), Kind::Alone) => {
            Err(Unfit::Refused("it is a replica, and replicas take no writes; name its master".to_owned()))
        }
        _ => Ok(()),
    }
}

fn unfit(info: &str, kind: Kind) -> Option<String> {
    let version = field(info, "redis_version").unwrap_or_default();
    let major: Option<u32> = version.split('.').next().and_then(|major| major.parse().ok());
    if major.is_none_or(|major| major < 7) {
        return Some(format!("it is Redis {version}, and functions need version 7 or later; upgrade it"));
    }
    match (field(info, "redis_mode"), kind) {
        (Some("cluster"), Kind::Alone) => {
            return Some("it is a node of a cluster; write redis+cluster:// in `online:`".to_owned());
        }
        (mode, Kind::Cluster) if mode != Some("cluster") => {
            return Some("it is no node of a cluster; write redis:// in `online:`".to_owned());
        }
        _ => {}
    }
    let policy = field(info, "maxmemory_policy").unwrap_or_default();
    (policy != "noeviction").then(|| {
        format!(
            "its maxmemory-policy is `{policy}`, so it drops features when memory is short, which would be served as \
             missing; set it to noeviction"
        )
    })
}

/// What [`report`] is made of.
pub(super) fn report_commands(kind: Kind) -> Vec<Cmd> {
    let mut commands = vec![Cmd::new(), Cmd::new()];
    commands[0].arg("INFO");
    commands[1].arg("CONFIG").arg("GET").arg("appendfsync");
    if kind == Kind::Cluster {
        let mut state = Cmd::new();
        state.arg("CLUSTER").arg("INFO");
        commands.push(state);
    }
    commands
}

/// What a server says of itself, for people.
pub(super) fn report(place: &str, kind: Kind, answers: &[Value]) -> NodeReport {
    let text =
        |at: usize| answers.get(at).and_then(|value| String::from_redis_value_ref(value).ok()).unwrap_or_default();
    let info = text(0);
    let role = if field(&info, "role") == Some("slave") { "replica" } else { "master" };
    // A hosted Redis may not answer CONFIG.
    let settings = answers.get(1).map(Vec::<String>::from_redis_value_ref);
    let durability = match (field(&info, "aof_enabled"), settings) {
        (Some("0"), _) => "no append-only file".to_owned(),
        (_, Some(Ok(settings))) if settings.len() == 2 => format!("appendfsync {}", settings[1]),
        _ => "unknown".to_owned(),
    };
    let (used_bytes, max_bytes) = memory(&info);
    let mut problems: Vec<String> = unfit(&info, kind).into_iter().collect();
    if let (Some(used), Some(max)) = (used_bytes, max_bytes)
        && used as f64 > max as f64 * MEMORY_SHARE_MAX
    {
        problems.push(format!(
            "it uses {}, and refuses writes when all of it is used; {MORE_MEMORY}",
            shown_memory(used_bytes, max_bytes)
        ));
    }
    let mut problem = |name: &str, bad: &str, what: &str| {
        if field(&info, name) == Some(bad) {
            problems.push(what.to_owned());
        }
    };
    problem("loading", "1", "it loads its data, and answers when it has; wait");
    problem("aof_last_write_status", "err", "its last write to the append-only file failed; free or repair its disk");
    problem(
        "master_link_status",
        "down",
        "it is not connected to its master, so a failover to it would lose writes; check both and the network",
    );
    if field(&text(2), "cluster_state") == Some("fail") {
        problems
            .push("it says that the cluster is down; `redis-cli --cluster check` names the masters missing".to_owned());
    }
    NodeReport {
        place: place.to_owned(),
        role: role.to_owned(),
        used_bytes,
        max_bytes,
        keys: field(&info, "db0").and_then(|db| db.strip_prefix("keys=")?.split(',').next()?.parse().ok()),
        durability,
        problems,
    }
}

/// Of a node that did not say anything.
pub(super) fn absent(place: &str, role: &str, error: &str) -> NodeReport {
    NodeReport {
        place: place.to_owned(),
        role: role.to_owned(),
        durability: "unknown".to_owned(),
        problems: vec![error.to_owned()],
        ..NodeReport::default()
    }
}

const MORE_MEMORY: &str = "raise maxmemory, remove views that nobody serves (`coeval plan` says what each entity costs), or \
                           add masters to a cluster";

/// Why a write is refused for want of memory.
pub(super) fn out_of_memory(info: &str) -> String {
    let (used, max) = memory(info);
    format!("OOM: its memory is full ({}), so it refuses writes; reads go on; {MORE_MEMORY}", shown_memory(used, max))
}

/// Used, and the limit if one is set.
fn memory(info: &str) -> (Option<u64>, Option<u64>) {
    (number(info, "used_memory"), number(info, "maxmemory").filter(|bytes| *bytes > 0))
}

fn shown_memory(used: Option<u64>, max: Option<u64>) -> String {
    let mib =
        |bytes: Option<u64>| bytes.map_or("?".to_owned(), |bytes| format!("{:.1}", bytes as f64 / (1 << 20) as f64));
    format!("{} of {} MiB", mib(used), mib(max))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_server(kind: Kind, version: &str, mode: &str, role: &str, policy: &str, expected: Result<(), &str>) {
        let info = format!(
            "# Server\r\nredis_version:{version}\r\nredis_mode:{mode}\r\n# Memory\r\nmaxmemory_policy:{policy}\r\n# Replication\r\nrole:{role}\r\n"
        );
        match (check(&info, kind), expected) {
            (Ok(()), Ok(())) => {}
            (Err(Unfit::Refused(text)), Err(part)) => assert!(text.contains(part), "{text}"),
            (Err(Unfit::Replica), Err("replica")) => {}
            (found, expected) => panic!("{found:?}, not {expected:?}"),
        }
    }

    #[test]
    fn servers_that_can_be_stores() {
        let alone =
            |version, mode, role, policy, expected| check_server(Kind::Alone, version, mode, role, policy, expected);
        alone("7.0.15", "standalone", "master", "noeviction", Ok(()));
        alone("8.2.1", "standalone", "master", "noeviction", Ok(()));
        alone("10.0", "standalone", "master", "noeviction", Ok(()));
        alone("6.2.14", "standalone", "master", "noeviction", Err("it is Redis 6.2.14"));
        alone("", "standalone", "master", "noeviction", Err("version 7 or later"));
        alone("7.2.0", "cluster", "master", "noeviction", Err("write redis+cluster://"));
        alone("7.2.0", "standalone", "slave", "noeviction", Err("name its master"));
        alone("7.2.0", "standalone", "master", "allkeys-lru", Err("maxmemory-policy is `allkeys-lru`"));
        let node = |mode, role, policy, expected| check_server(Kind::Cluster, "7.2.0", mode, role, policy, expected);
        node("cluster", "master", "noeviction", Ok(()));
        node("cluster", "slave", "noeviction", Err("replica"));
        node("cluster", "master", "volatile-ttl", Err("maxmemory-policy is `volatile-ttl`"));
        node("standalone", "master", "noeviction", Err("it is no node of a cluster"));
    }

    #[test]
    fn a_report_says_what_is_wrong() {
        let info = "redis_version:7.0.15\r\nredis_mode:standalone\r\nrole:slave\r\nused_memory:950000\r\n\
                    maxmemory:1000000\r\nmaxmemory_policy:noeviction\r\naof_enabled:1\r\naof_last_write_status:err\r\n\
                    master_link_status:down\r\ndb0:keys=12,expires=3,avg_ttl=0\r\n";
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let settings = Value::Array(vec![text("appendfsync"), text("everysec")]);
        let node = report("there", Kind::Alone, &[text(info), settings]);
        assert_eq!((node.place.as_str(), node.role.as_str()), ("there", "replica"));
        assert_eq!((node.used_bytes, node.max_bytes, node.keys), (Some(950_000), Some(1_000_000), Some(12)));
        assert_eq!(node.durability, "appendfsync everysec");
        let parts =
            ["it uses 0.9 of 1.0 MiB", "its last write to the append-only file failed", "not connected to its master"];
        assert_eq!(node.problems.len(), parts.len(), "{:?}", node.problems);
        for (problem, part) in node.problems.iter().zip(parts) {
            assert!(problem.contains(part), "{problem}");
        }
        assert!(out_of_memory(info).contains("0.9 of 1.0 MiB"));
    }
}
