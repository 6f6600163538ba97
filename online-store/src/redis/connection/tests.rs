use super::*;

#[track_caller]
fn check_server(version: &str, mode: &str, role: &str, policy: &str, expected: Result<(), &str>) {
    let info = format!(
        "# Server\r\nredis_version:{version}\r\nredis_mode:{mode}\r\n# Memory\r\nmaxmemory_policy:{policy}\r\n# Replication\r\nrole:{role}\r\n"
    );
    match (check_info(&info), expected) {
        (Ok(()), Ok(())) => {}
        (Err(text), Err(part)) => assert!(text.contains(part), "{text}"),
        (found, expected) => panic!("{found:?}, not {expected:?}"),
    }
}

#[test]
fn servers_that_can_be_stores() {
    check_server("7.0.15", "standalone", "master", "noeviction", Ok(()));
    check_server("8.2.1", "standalone", "master", "noeviction", Ok(()));
    check_server("10.0", "standalone", "master", "noeviction", Ok(()));
    check_server("6.2.14", "standalone", "master", "noeviction", Err("it is Redis 6.2.14"));
    check_server("", "standalone", "master", "noeviction", Err("version 7 or later"));
    check_server("7.2.0", "cluster", "master", "noeviction", Err("node of a cluster"));
    check_server("7.2.0", "standalone", "slave", "noeviction", Err("name its master"));
    check_server("7.2.0", "standalone", "master", "allkeys-lru", Err("maxmemory-policy is `allkeys-lru`"));
}

#[track_caller]
fn check_address(url: &str, expected: Result<&str, &str>) {
    match (Server::new(url, Duration::from_secs(1)), expected) {
        (Ok(server), Ok(place)) => assert_eq!(server.place, place),
        (Err(error), Err(part)) => {
            let text = error.to_string();
            assert!(text.contains(part), "{text}");
            assert!(!text.contains("hunter2"), "{text}");
            assert!(!error.is_retryable());
        }
        (Ok(server), Err(part)) => panic!("{} is accepted, not refused with {part}", server.place),
        (Err(error), Ok(place)) => panic!("{error}, not {place}"),
    }
}

#[test]
fn addresses() {
    check_address("redis://127.0.0.1:7000", Ok("redis://127.0.0.1:7000"));
    check_address("redis://host", Ok("redis://host:6379"));
    check_address("redis://user:hunter2@host:1/3", Ok("redis://host:1/3"));
    check_address("redis+unix:///run/redis.sock", Ok("/run/redis.sock"));
    check_address("rediss://:hunter2@host", Err("TLS is not supported yet"));
    check_address("redis+cluster://:hunter2@a:6379,b:6379", Err("Redis Cluster is not supported yet"));
    check_address("redis://:hunter2@host:notaport", Err("should look like redis://host:port"));
    check_address("hunter2", Err("should look like redis://host:port"));
    check_address("", Err("should look like redis://host:port"));
}
