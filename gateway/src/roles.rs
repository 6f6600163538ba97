//! What one process does of what a project needs done.
//!
//! One process does all of it by default. Several share a project through the control log, the object store and Redis: as many
//! gateways as there is traffic for, and one writer of the online store. What a process does not do it refuses in words that
//! say where to go, rather than half.

use std::fmt;
use std::str::FromStr;

use feature_defs::catalog::OnlineUrl;

/// A part of the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Answers GetFeatures and Predict, and holds models.
    Gateway,
    /// Takes events, writes the online store and history.
    Ingest,
    /// Computes training sets, and audits what was served.
    Offline,
}

const ROLES: [Role; 3] = [Role::Gateway, Role::Ingest, Role::Offline];

/// At least one role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Roles {
    has: [bool; ROLES.len()],
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RolesError {
    #[error("there is no role `{0}`; write `all`, or some of gateway, ingest, offline with commas between them")]
    Unknown(String),
    #[error(
        "the roles are `{0}`, and `online: embedded` is a store of one process: what another one writes could not be read. Run \
         gateway and ingest in one process (leave `--roles` out), or share a Redis: `online: redis://host:6379` in coeval.yaml"
    )]
    Embedded(Roles),
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Role::Gateway => "gateway",
            Role::Ingest => "ingest",
            Role::Offline => "offline",
        }
    }
}

impl Roles {
    pub const ALL: Roles = Roles { has: [true; ROLES.len()] };

    pub fn has(self, role: Role) -> bool {
        self.has[role as usize]
    }

    /// Refuses what could not work with this online store.
    pub fn check_online(self, online: &OnlineUrl) -> Result<(), RolesError> {
        let together = self.has(Role::Gateway) && self.has(Role::Ingest);
        if *online == OnlineUrl::Embedded && !together { Err(RolesError::Embedded(self)) } else { Ok(()) }
    }

    /// What to tell a caller who asks for what this process does not do.
    pub fn elsewhere(self, role: Role, what: &str) -> String {
        let role = role.name();
        format!("{what}, because this process runs as `--roles {self}`; ask one that has the role `{role}`")
    }
}

impl FromStr for Roles {
    type Err = RolesError;

    fn from_str(text: &str) -> Result<Roles, RolesError> {
        if text.trim() == "all" {
            return Ok(Roles::ALL);
        }
        let mut has = [false; ROLES.len()];
        for name in text.split(',').map(str::trim) {
            let role = ROLES.into_iter().find(|role| role.name() == name);
            has[role.ok_or_else(|| RolesError::Unknown(name.to_owned()))? as usize] = true;
        }
        Ok(Roles { has })
    }
}

impl fmt::Display for Roles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Roles::ALL {
            return f.write_str("all");
        }
        let names: Vec<&str> = ROLES.into_iter().filter(|role| self.has(*role)).map(Role::name).collect();
        f.write_str(&names.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_read_and_shown() {
        fn check(text: &str, expected: &str) {
            let shown = text.parse::<Roles>().map_or_else(|error| error.to_string(), |roles| roles.to_string());
            assert!(shown.starts_with(expected), "{text}: {shown}");
        }
        check("all", "all");
        check("gateway", "gateway");
        check("offline, ingest", "ingest,offline");
        check("gateway,ingest,offline", "all");
        check("gateway,,ingest", "there is no role ``");
        check("getaway", "there is no role `getaway`; write `all`");
        check("", "there is no role ``");
    }

    #[test]
    fn the_embedded_store_is_one_process() {
        fn check(roles: &str, fits: bool) {
            let roles: Roles = roles.parse().unwrap();
            assert_eq!(roles.check_online(&OnlineUrl::Embedded).is_ok(), fits, "{roles}");
        }
        check("all", true);
        check("gateway,ingest", true);
        check("gateway", false);
        check("ingest,offline", false);
    }
}
