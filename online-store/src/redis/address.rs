//! What `online:` says of a Redis: where it is, who we are to it, and whom we trust.

use std::sync::Arc;
use std::time::Duration;

use ::redis::io::tcp::TcpSettings;
use ::redis::{
    Client, ClientTlsConfig, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisError, TlsCertificates,
};

use super::connection::{Kind, Server};
use crate::StoreError;

const PORT: u16 = 6379;

/// An address that was understood. The password is in `info` and nowhere else.
pub(super) struct Address {
    info: ConnectionInfo,
    pub(super) kind: Kind,
    /// Host and port of every node named; empty for a socket in the file system.
    pub(super) seeds: Vec<(String, u16)>,
    /// The address without user, password and parameters.
    pub(super) place: String,
    scheme: &'static str,
}

impl Address {
    /// Understands `redis://[user:password@]host:port[/db]`, `rediss://` for TLS, `redis+cluster://` and `rediss+cluster://`
    /// with several `host:port`, and `redis+unix:///path`. With TLS: `?ca=/path.pem` for a certificate authority that the
    /// system does not know, `&cert=/path.pem&key=/path.pem` for a certificate of ours.
    pub(super) fn parse(url: &str) -> Result<Address, StoreError> {
        // An address may hold a password, so only its scheme is shown until it is understood.
        let (given, rest) = url.split_once("://").unwrap_or(("", url));
        let (scheme, kind) = match given {
            "redis" => ("redis", Kind::Alone),
            "rediss" => ("rediss", Kind::Alone),
            "redis+cluster" => ("redis", Kind::Cluster),
            "rediss+cluster" => ("rediss", Kind::Cluster),
            "redis+unix" | "unix" => return Address::socket(url),
            _ => {
                let what = "the address should look like redis://host:port; correct `online:` in coeval.yaml";
                return Err(refused("an unknown address", what));
            }
        };
        let wrong = |what: &str| {
            let example = if kind == Kind::Cluster { "a:6379,b:6379" } else { "host:port" };
            refused(
                &format!("{given}://"),
                &format!("the address is wrong ({what}); it should look like {given}://{example}"),
            )
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        if rest.contains('#') || query.contains('#') {
            return Err(wrong("a `#`, which means nothing here; write %23 in a password"));
        }
        let (credentials, hosts) = rest.rsplit_once('@').map_or(("", rest), |(before, hosts)| (before, hosts));
        let (hosts, path) = hosts.split_once('/').unwrap_or((hosts, ""));
        if kind == Kind::Cluster && !path.is_empty() {
            return Err(wrong("a cluster has one database, without a number"));
        }
        let seeds: Option<Vec<(String, u16)>> = hosts.split(',').map(|seed| host_and_port(seed.trim())).collect();
        let seeds = seeds.ok_or_else(|| wrong("a host or port that is none"))?;
        if kind == Kind::Alone && seeds.len() > 1 {
            return Err(wrong(&format!("several hosts; a cluster is {scheme}+cluster://")));
        }
        let at = if credentials.is_empty() { "" } else { "@" };
        let (host, port) = &seeds[0];
        let first = format!("{scheme}://{credentials}{at}{}/{path}", joined(host, *port));
        let info = first.into_connection_info().map_err(|error| wrong(&error.to_string()))?;
        let mut place = format!("{given}://");
        for (number, (host, port)) in seeds.iter().enumerate() {
            place.extend([if number > 0 { "," } else { "" }, &joined(host, *port)]);
        }
        if info.redis_settings().db() != 0 {
            place = format!("{place}/{}", info.redis_settings().db());
        }
        if scheme == "rediss" {
            // Fails where the process has chosen already, which is as good.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        let info = with_certificates(info, scheme == "rediss", query, &place)?;
        Ok(Address { info, kind, seeds, place, scheme })
    }

    fn socket(url: &str) -> Result<Address, StoreError> {
        let wrong = |error: RedisError| refused("redis+unix://", &format!("the address is wrong ({error})"));
        let info = url.into_connection_info().map_err(wrong)?;
        let mut place = info.addr().to_string();
        if info.redis_settings().db() != 0 {
            place = format!("{place}/{}", info.redis_settings().db());
        }
        Ok(Address { info, kind: Kind::Alone, seeds: Vec::new(), place, scheme: "redis+unix" })
    }

    /// The one server of an address that is no cluster.
    pub(super) fn server(&self, timeout: Duration) -> Result<Server, StoreError> {
        self.open(self.info.clone(), self.place.clone(), timeout)
    }

    /// A node of the cluster.
    pub(super) fn node(&self, host: &str, port: u16, timeout: Duration) -> Result<Server, StoreError> {
        let addr = match self.info.addr() {
            ConnectionAddr::TcpTls { insecure, tls_params, .. } => ConnectionAddr::TcpTls {
                host: host.to_owned(),
                port,
                insecure: *insecure,
                tls_params: tls_params.clone(),
            },
            _ => ConnectionAddr::Tcp(host.to_owned(), port),
        };
        let place = format!("{}://{}", self.scheme, joined(host, port));
        self.open(self.info.clone().set_addr(addr), place, timeout)
    }

    fn open(&self, info: ConnectionInfo, place: String, timeout: Duration) -> Result<Server, StoreError> {
        let info = info.set_tcp_settings(TcpSettings::default().set_nodelay(true));
        let client = Client::open(info).map_err(|error| refused(&place, &error.to_string()))?;
        Ok(Server { client, kind: self.kind, place: Arc::from(place), timeout })
    }
}

fn refused(place: &str, what: &str) -> StoreError {
    StoreError::Refused { place: place.to_owned(), what: what.to_owned() }
}

/// `host:port` as it is written, with brackets around addresses that hold colons.
fn joined(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

fn host_and_port(text: &str) -> Option<(String, u16)> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']')?;
            (host, rest.strip_prefix(':').map_or(Some(PORT), |port| port.parse().ok())?)
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host, port.parse().ok()?),
            None => (text, PORT),
        },
    };
    (!host.is_empty()).then(|| (host.to_owned(), port))
}

/// Whom to trust, and who we are, from the parameters of the address.
fn with_certificates(
    info: ConnectionInfo,
    is_tls: bool,
    query: &str,
    place: &str,
) -> Result<ConnectionInfo, StoreError> {
    let (mut ca, mut cert, mut key) = (None, None, None);
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, path) = parameter.split_once('=').unwrap_or((parameter, ""));
        let to = match name {
            "ca" => &mut ca,
            "cert" => &mut cert,
            "key" => &mut key,
            _ => {
                let what = format!("its address has a parameter `{name}`; those known are `ca`, `cert` and `key`");
                return Err(refused(place, &what));
            }
        };
        *to = Some(read_pem(name, path, place)?);
    }
    if ca.is_none() && cert.is_none() && key.is_none() {
        return Ok(info);
    }
    if !is_tls {
        return Err(refused(place, "its address names certificates, but without TLS; write rediss://"));
    }
    let client_tls = match (cert, key) {
        (Some(client_cert), Some(client_key)) => Some(ClientTlsConfig { client_cert, client_key }),
        (None, None) => None,
        _ => return Err(refused(place, "`cert` and `key` of its address go together; name both or neither")),
    };
    let certificates = TlsCertificates { client_tls, root_cert: ca };
    let client = Client::build_with_tls(info, certificates)
        .map_err(|error| refused(place, &format!("the certificates of its address cannot be used: {error}")))?;
    Ok(client.get_connection_info().clone())
}

fn read_pem(name: &str, path: &str, place: &str) -> Result<Vec<u8>, StoreError> {
    let pem = std::fs::read(path)
        .map_err(|error| refused(place, &format!("`{name}` of its address, {path}, cannot be read: {error}")))?;
    let expected: &[u8] = if name == "key" { b"PRIVATE KEY-----" } else { b"-----BEGIN CERTIFICATE-----" };
    if !pem.windows(expected.len()).any(|part| part == expected) {
        let what = format!(
            "`{name}` of its address, {path}, holds no PEM {}",
            if name == "key" { "key" } else { "certificate" }
        );
        return Err(refused(place, &what));
    }
    Ok(pem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(url: &str, expected: Result<(&str, usize), &str>) {
        match (Address::parse(url), expected) {
            (Ok(address), Ok((place, seeds))) => {
                assert_eq!(address.place, place);
                assert_eq!(address.seeds.len(), seeds);
            }
            (Err(error), Err(part)) => {
                let text = error.to_string();
                assert!(text.contains(part), "{text}");
                assert!(!text.contains("hunter2"), "{text}");
                assert!(!error.is_retryable());
            }
            (Ok(address), Err(part)) => panic!("{} is accepted, not refused with {part}", address.place),
            (Err(error), Ok((place, _))) => panic!("{error}, not {place}"),
        }
    }

    #[test]
    fn addresses() {
        check("redis://127.0.0.1:7000", Ok(("redis://127.0.0.1:7000", 1)));
        check("redis://host", Ok(("redis://host:6379", 1)));
        check("redis://user:hunter2@host:1/3", Ok(("redis://host:1/3", 1)));
        check("redis://user:hunter2%2f%23@host:1", Ok(("redis://host:1", 1)));
        check("redis://[::1]:7000", Ok(("redis://[::1]:7000", 1)));
        check("rediss://:hunter2@host", Ok(("rediss://host:6379", 1)));
        check("redis+unix:///run/redis.sock", Ok(("/run/redis.sock", 0)));
        check("redis+cluster://:hunter2@a:6379,b:7000, [::1]:1", Ok(("redis+cluster://a:6379,b:7000,[::1]:1", 3)));
        check("rediss+cluster://u:hunter2@a:6379", Ok(("rediss+cluster://a:6379", 1)));
        check("redis+cluster://:hunter2@a:6379/1", Err("a cluster has one database"));
        check("redis://:hunter2@a:6379,b:6379", Err("a cluster is redis+cluster://"));
        check("redis://:hunter2@host:notaport", Err("should look like redis://host:port"));
        check("redis+cluster://:hunter2@a:1,:2", Err("should look like redis+cluster://a:6379,b:6379"));
        check("rediss://:hunter2@host#insecure", Err("a `#`"));
        check("rediss://:hunter2@host?ca=/nowhere/ca.pem", Err("/nowhere/ca.pem, cannot be read"));
        check("rediss://:hunter2@host?insecure=1", Err("a parameter `insecure`"));
        check("hunter2", Err("should look like redis://host:port"));
        check("", Err("should look like redis://host:port"));
    }

    #[test]
    fn certificates_that_cannot_be_used() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let (empty, broken) = (file("empty", ""), file("broken", "-----BEGIN CERTIFICATE-----\n!\n"));
        let key = file("key", "-----BEGIN PRIVATE KEY-----\n");
        check(&format!("rediss://:hunter2@host?ca={empty}"), Err("holds no PEM certificate"));
        check(&format!("rediss://:hunter2@host?ca={broken}"), Err("cannot be used"));
        check(&format!("rediss://:hunter2@host?key={key}"), Err("go together"));
        check(&format!("redis://:hunter2@host?ca={broken}"), Err("without TLS; write rediss://"));
    }
}
