//! A real Redis Cluster for tests: started in a folder on free ports of this machine, stopped when dropped.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use ::redis::{FromRedisValue, Value};

use super::redis_server::{RedisServer, free_port};

/// How long the nodes may take to agree.
const AGREE: Duration = Duration::from_secs(40);
const SLOTS: usize = 16_384;

/// Running nodes: the masters, then one replica of each if there are any.
pub struct RedisCluster {
    pub nodes: Vec<RedisServer>,
    /// Of the nodes, where the options name certificates.
    pub tls_ports: Vec<u16>,
}

impl RedisCluster {
    /// So many masters with equal shares of the slots, each with one replica or none. None if there is no `redis-server`.
    pub fn start(folder: &Path, masters: usize, has_replicas: bool, options: &[&str]) -> Option<RedisCluster> {
        let count = if has_replicas { 2 * masters } else { masters };
        let mut nodes = Vec::new();
        let mut buses = Vec::new();
        let mut tls_ports = Vec::new();
        let is_tls = options.iter().any(|option| option.starts_with("--tls"));
        for number in 0..count {
            let folder = folder.join(number.to_string());
            std::fs::create_dir_all(&folder).expect("the folder of a node can be made");
            // The usual port of the cluster's own protocol, 10,000 further, may be beyond the last.
            let bus = free_port().to_string();
            let mut all = vec!["--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-port", &bus];
            all.extend(["--repl-diskless-sync-delay", "0", "--cluster-replica-validity-factor", "0"]);
            all.extend(["--repl-ping-replica-period", "1"]);
            all.extend(options);
            let tls_port = free_port();
            let tls_port_option = tls_port.to_string();
            if is_tls {
                // Without the last, nodes tell each other's other ports.
                all.extend(["--tls-port", &tls_port_option, "--tls-replication", "yes", "--tls-cluster", "yes"]);
                tls_ports.push(tls_port);
            }
            nodes.push(RedisServer::start_with(&folder, &all)?);
            buses.push(bus);
        }
        let cluster = RedisCluster { nodes, tls_ports };
        for (number, node) in cluster.nodes[..masters].iter().enumerate() {
            let [first, last] = [number, number + 1].map(|number| number * SLOTS / masters);
            ask(node, &["CLUSTER", "ADDSLOTSRANGE", &first.to_string(), &(last - 1).to_string()]);
        }
        for (number, node) in cluster.nodes.iter().enumerate() {
            ask(node, &["CLUSTER", "SET-CONFIG-EPOCH", &(number + 1).to_string()]);
        }
        for (number, (node, bus)) in cluster.nodes.iter().zip(&buses).enumerate().skip(1) {
            let port = cluster.tls_ports.get(number).copied().unwrap_or(node.port());
            ask(&cluster.nodes[0], &["CLUSTER", "MEET", "127.0.0.1", &port.to_string(), bus]);
        }
        let known = format!("cluster_known_nodes:{count}\r");
        cluster.wait(|cluster| cluster.nodes.iter().all(|node| says(node, &["CLUSTER", "INFO"], &known)));
        for number in masters..count {
            let master = cluster.id(number - masters);
            ask(&cluster.nodes[number], &["CLUSTER", "REPLICATE", &master]);
        }
        cluster.wait_until_ok();
        if has_replicas {
            // A replica is named once it has taken over everything and said so to everybody.
            cluster.wait(|cluster| cluster.nodes.iter().all(names_replicas));
        }
        Some(cluster)
    }

    /// Waits until all nodes that run say that the cluster is whole.
    pub fn wait_until_ok(&self) {
        let ok = |node: &RedisServer| node.pid().is_none() || says(node, &["CLUSTER", "INFO"], "cluster_state:ok");
        self.wait(|cluster| cluster.nodes.iter().all(ok));
    }

    /// Waits until the replica of a master has all that the master has now.
    pub fn wait_until_replicated(&self, master: usize) {
        let number = |info: &str, name: &str| -> Option<u64> {
            let (_, rest) = info.split_once(name)?;
            rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
        };
        let info = || shown(&self.nodes[master], &["INFO", "replication"]);
        let sent = number(&info(), "master_repl_offset:").unwrap_or(u64::MAX);
        self.wait(|_| number(&info(), ",offset=").is_some_and(|taken| taken >= sent));
    }

    fn wait(&self, done: impl Fn(&RedisCluster) -> bool) {
        let start = Instant::now();
        while !done(self) {
            let nodes = || shown(&self.nodes[0], &["CLUSTER", "NODES"]);
            assert!(start.elapsed() < AGREE, "the nodes do not agree: {}", nodes());
            sleep(Duration::from_millis(20));
        }
    }

    pub fn url(&self) -> String {
        let seeds: Vec<String> = self.nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())).collect();
        format!("redis+cluster://{}", seeds.join(","))
    }

    /// What a node calls itself.
    pub fn id(&self, node: usize) -> String {
        shown(&self.nodes[node], &["CLUSTER", "MYID"])
    }
}

fn ask(node: &RedisServer, parts: &[&str]) -> Value {
    node.ask(parts).unwrap_or_else(|error| panic!("{parts:?}: {error}"))
}

/// A text answer; empty from a node that is away.
fn shown(node: &RedisServer, parts: &[&str]) -> String {
    node.ask(parts).ok().and_then(|value| String::from_redis_value(value).ok()).unwrap_or_default()
}

fn names_replicas(node: &RedisServer) -> bool {
    let Ok(Value::Array(ranges)) = node.ask(&["CLUSTER", "SLOTS"]) else { return false };
    // First slot, last slot, master, replica.
    ranges.iter().all(|range| matches!(range, Value::Array(parts) if parts.len() == 4))
}

fn says(node: &RedisServer, parts: &[&str], part: &str) -> bool {
    shown(node, parts).contains(part)
}
