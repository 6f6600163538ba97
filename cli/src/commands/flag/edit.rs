//! From words to a flag: what the command line names is changed, everything else stays.

use registry::assignment::BUCKETS;
use registry::flags::{Flag, Kind, Rule, Slice, Split, Then};
use registry::id::FlagName;
use serde_json::{Value as Json, json};

use crate::error::CliError;

#[derive(Debug, clap::Args)]
pub struct Edit {
    /// boolean, string, integer, float or object; without it, what the variants are
    #[arg(long = "type", value_name = "TYPE", value_parser = kind)]
    kind: Option<Kind>,
    /// A variant and its value, as JSON; may be repeated. A boolean flag has `on` and `off` without it
    #[arg(long = "variant", value_name = "NAME=VALUE")]
    variants: Vec<String>,
    /// The variant of whoever no rule decides for; without it, `off` of a boolean flag
    #[arg(long, value_name = "VARIANT")]
    default: Option<String>,
    /// A condition over attributes, and who meets it gets: a variant, or shares of it. Tried in this order; may be repeated. Replaces the
    /// rules with conditions
    #[arg(long = "rule", value_name = "CONDITION -> VARIANT")]
    rules: Vec<String>,
    /// Shares of the units that no rule decided for, such as `on=10%,blue=5%`; may be repeated. Replaces the last rule
    #[arg(long = "split", value_name = "VARIANT=SHARE", value_delimiter = ',')]
    splits: Vec<String>,
    /// What splits throw units by; flags of one layer can be kept apart. Without it, the flag's own
    #[arg(long, value_name = "NAME")]
    layer: Option<String>,
    /// No rules with conditions any more
    #[arg(long, conflicts_with = "rules")]
    no_rules: bool,
    /// No split of those whom no rule decided for any more
    #[arg(long, conflicts_with = "splits")]
    no_split: bool,
    /// Everybody gets the default
    #[arg(long, conflicts_with = "enable")]
    disable: bool,
    /// Rules decide again
    #[arg(long)]
    enable: bool,
    /// What the flag is for
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
    /// The whole flag as JSON, as `coeval flag get --json` shows it; `-` for standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "kind", "variants", "default", "rules", "splits", "layer", "no_rules", "no_split", "disable", "enable", "description",
    ])]
    file: Option<std::path::PathBuf>,
}

fn kind(text: &str) -> Result<Kind, String> {
    Kind::of_name(text).ok_or_else(|| format!("write one of {}", Kind::ALL.map(Kind::name).join(", ")))
}

/// `12.5%` as 1,250 of 10,000.
pub fn share(text: &str) -> Result<u16, String> {
    let wrong = || "write a share such as 25% or 0.05%, in steps of 0.01%".to_owned();
    let digits = text.trim().strip_suffix('%').ok_or_else(wrong)?.trim();
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if fraction.len() > 2 || whole.is_empty() || !whole.bytes().chain(fraction.bytes()).all(|b| b.is_ascii_digit()) {
        return Err(wrong());
    }
    let share: u32 = format!("{whole}{fraction:0<2}").parse().map_err(|_| wrong())?;
    u16::try_from(share).ok().filter(|share| *share <= BUCKETS).ok_or_else(|| "there is no more than 100%".to_owned())
}

pub fn percent(share: u16) -> String {
    let (whole, fraction) = (share / 100, share % 100);
    match fraction {
        0 => format!("{whole}%"),
        fraction => format!("{whole}.{}%", format!("{fraction:02}").trim_end_matches('0')),
    }
}

fn usage(text: impl Into<String>) -> CliError {
    CliError::Usage(text.into())
}

impl Edit {
    /// The flag as it is to be.
    pub fn of(&self, name: &str, known: Option<&Flag>) -> Result<Flag, CliError> {
        let flag_name = FlagName::try_new(name)?;
        if let Some(file) = &self.file {
            let flag = read(file)?;
            if flag.name != flag_name {
                return Err(usage(format!("the file is of flag `{}`, not of `{name}`", flag.name)));
            }
            return Ok(flag);
        }
        let (kind, variants) = self.variants(known)?;
        let default = match (&self.default, known) {
            (Some(default), _) => default.clone(),
            (None, Some(known)) => known.default.clone(),
            (None, None) if kind == Kind::Boolean && variants.contains_key("off") => "off".to_owned(),
            (None, None) => return Err(usage("name the variant of whoever no rule decides for with `--default`")),
        };
        let enabled = match known {
            _ if self.disable => false,
            Some(known) => known.enabled || self.enable,
            None => true,
        };
        let rules = self.rules(name, known)?;
        let description = self.description.clone().or_else(|| known.and_then(|known| known.description.clone()));
        Ok(Flag { name: flag_name, kind, variants, default, enabled, rules, description })
    }

    fn variants(&self, known: Option<&Flag>) -> Result<(Kind, std::collections::BTreeMap<String, Json>), CliError> {
        if self.variants.is_empty() {
            return match (known, self.kind) {
                (Some(known), kind) => Ok((kind.unwrap_or(known.kind), known.variants.clone())),
                (None, None | Some(Kind::Boolean)) => {
                    Ok((Kind::Boolean, [("off".to_owned(), json!(false)), ("on".to_owned(), json!(true))].into()))
                }
                (None, Some(_)) => Err(usage("name the variants, such as `--variant small=10 --variant large=100`")),
            };
        }
        let kind = self.kind.or_else(|| known.map(|known| known.kind));
        let mut variants = std::collections::BTreeMap::new();
        for text in &self.variants {
            let (name, value) = text
                .split_once('=')
                .filter(|(name, _)| !name.trim().is_empty())
                .ok_or_else(|| usage(format!("`--variant {text}` is no variant; write NAME=VALUE")))?;
            let parsed = serde_json::from_str(value).ok();
            // A text needs no quotes, and one that looks like a number stays one.
            let value = match (kind, parsed) {
                (Some(Kind::String), Some(parsed @ Json::String(_))) => parsed,
                (Some(Kind::String), _) | (None, None) => json!(value),
                (_, Some(parsed)) => parsed,
                (Some(kind), None) => {
                    return Err(usage(format!("`--variant {text}`: `{value}` is no {} as JSON", kind.name())));
                }
            };
            if variants.insert(name.trim().to_owned(), value).is_some() {
                return Err(usage(format!("variant `{}` is named twice", name.trim())));
            }
        }
        let kind = kind.or_else(|| Kind::ALL.into_iter().find(|kind| variants.values().all(|value| kind.holds(value))));
        let kind = kind.ok_or_else(|| usage("the variants are of different types; name the flag's with `--type`"))?;
        Ok((kind, variants))
    }

    /// Rules with conditions first, then what happens to everybody else.
    fn rules(&self, name: &str, known: Option<&Flag>) -> Result<Vec<Rule>, CliError> {
        let known = known.map_or(&[][..], |flag| &flag.rules);
        let mut rules = Vec::new();
        if self.rules.is_empty() && !self.no_rules {
            rules.extend(known.iter().filter(|rule| rule.when.is_some()).cloned());
        }
        for text in &self.rules {
            let (when, then) = text.rsplit_once("->").ok_or_else(|| {
                usage(format!(
                    "`--rule '{text}'` is no rule; write CONDITION -> VARIANT, or CONDITION -> VARIANT=SHARE"
                ))
            })?;
            let (when, then) = (when.trim(), then.trim());
            let then = match then.contains('=') {
                false => Then::Variant(then.to_owned()),
                true => {
                    let parts: Vec<String> = then.split(',').map(str::to_owned).collect();
                    let before = known.iter().find(|rule| rule.when.as_deref() == Some(when));
                    // Another order than the others' of this flag: who is in one split says nothing of the next.
                    Then::Split(self.split(name, &format!("{name}: {when}"), &parts, before)?)
                }
            };
            rules.push(Rule { when: Some(when.to_owned()), then });
        }
        if self.splits.is_empty() && !self.no_split {
            rules.extend(known.iter().filter(|rule| rule.when.is_none()).cloned());
        } else if !self.splits.is_empty() {
            let before = known.iter().rfind(|rule| rule.when.is_none());
            rules.push(Rule { when: None, then: Then::Split(self.split(name, name, &self.splits, before)?) });
        }
        Ok(rules)
    }

    /// A split with these shares that moves as few units as it can.
    fn split(&self, name: &str, seed: &str, parts: &[String], before: Option<&Rule>) -> Result<Split, CliError> {
        let mut wanted: Vec<(String, u16)> = Vec::new();
        for part in parts {
            let (variant, of) =
                part.split_once('=').ok_or_else(|| usage(format!("`{part}` is no share; write VARIANT=SHARE")))?;
            let of = share(of).map_err(|error| usage(format!("`{part}`: {error}")))?;
            if wanted.iter().any(|(known, _)| known == variant.trim()) {
                return Err(usage(format!("variant `{}` has two shares", variant.trim())));
            }
            wanted.push((variant.trim().to_owned(), of));
        }
        let before = match before.map(|rule| &rule.then) {
            Some(Then::Split(split)) if self.layer.as_ref().is_none_or(|layer| *layer == split.layer) => Some(split),
            _ => None,
        };
        let mut split = before.cloned().unwrap_or_else(|| Split {
            layer: self.layer.clone().unwrap_or_else(|| name.to_owned()),
            seed: seed.to_owned(),
            slices: Vec::new(),
        });
        shrink(&mut split, &wanted);
        for (variant, share) in &wanted {
            split = split.ramp(variant, *share).ok_or_else(|| {
                usage(format!("the shares of a split are more than 100% together: {}", parts.join(", ")))
            })?;
        }
        Ok(split)
    }
}

/// Takes places away, the last first, until no variant has more than it should.
fn shrink(split: &mut Split, wanted: &[(String, u16)]) {
    let share = |variant: &str| wanted.iter().find(|(known, _)| known == variant).map_or(0, |(_, share)| *share);
    let names: Vec<String> = split.slices.iter().map(|slice| slice.variant.clone()).collect();
    for variant in names {
        let mut surplus = shares(split).find(|(known, _)| *known == variant).map_or(0, |(_, of)| of);
        surplus = surplus.saturating_sub(share(&variant));
        for slice in split.slices.iter_mut().rev().filter(|slice| slice.variant == variant) {
            let taken = surplus.min(slice.to - slice.from);
            slice.to -= taken;
            surplus -= taken;
        }
    }
    split.slices.retain(|slice| slice.from < slice.to);
}

/// What the variants of a split have, in the order of their first places.
fn shares(split: &Split) -> impl Iterator<Item = (String, u16)> {
    let mut shares: Vec<(String, u16)> = Vec::new();
    for Slice { variant, from, to } in &split.slices {
        match shares.iter_mut().find(|(known, _)| known == variant) {
            Some((_, share)) => *share += to - from,
            None => shares.push((variant.clone(), to - from)),
        }
    }
    shares.into_iter()
}

/// Raises the share of a variant in a split, and says what it was.
pub fn ramp(flag: &mut Flag, variant: &str, share: u16, rule: Option<usize>) -> Result<u16, CliError> {
    if !flag.variants.contains_key(variant) {
        return Err(CliError::unknown("variant", variant, flag.variants.keys().map(String::as_str)));
    }
    let name = flag.name.to_string();
    let places: Vec<usize> = flag
        .rules
        .iter()
        .enumerate()
        .filter(|(_, rule)| matches!(rule.then, Then::Split(_)))
        .map(|(at, _)| at)
        .collect();
    let at = match (rule, places.as_slice()) {
        (Some(number), places) if places.iter().any(|at| at + 1 == number) => number - 1,
        (Some(number), _) => return Err(usage(format!("rule {number} of `{name}` splits no units"))),
        (None, [one]) => *one,
        (None, []) => {
            let text = format!("flag `{name}` splits no units; `coeval flag set {name} --split {variant}=10%` begins");
            return Err(CliError::Failed(text));
        }
        (None, many) => {
            let many: Vec<String> = many.iter().map(|at| (at + 1).to_string()).collect();
            return Err(usage(format!(
                "rules {} of `{name}` split units; say which with `--rule`",
                many.join(" and ")
            )));
        }
    };
    let Some(Rule { then: Then::Split(split), .. }) = flag.rules.get_mut(at) else {
        return Err(usage(format!("flag `{name}` splits no units")));
    };
    let has = shares(split).find(|(known, _)| known == variant).map_or(0, |(_, share)| share);
    if share < has {
        return Err(CliError::Failed(format!(
            "`{variant}` of `{name}` has {} already, and a ramp only adds units; `coeval flag set {name} --split {variant}={} \
             --reshuffle` takes units away",
            percent(has),
            percent(share)
        )));
    }
    let all: u16 = shares(split).map(|(_, share)| share).sum();
    *split = split.ramp(variant, share).ok_or_else(|| {
        let free = percent(has + (BUCKETS - all.min(BUCKETS)));
        CliError::Failed(format!("other variants of `{name}` have the rest: `{variant}` can have at most {free}"))
    })?;
    Ok(has)
}

fn read(file: &std::path::Path) -> Result<Flag, CliError> {
    /// A flag has at most 64 KiB, and spaces between.
    const BYTES_MAX: u64 = 1 << 20;
    use std::io::Read as _;
    let failed = |source| CliError::Io { what: format!("could not read {}", file.display()), source };
    let source: Box<dyn std::io::Read> = match file.to_str() {
        Some("-") => Box::new(std::io::stdin()),
        _ => Box::new(std::fs::File::open(file).map_err(failed)?),
    };
    let mut text = String::new();
    source.take(BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
    let wrong = |error: serde_json::Error| usage(format!("{} holds no flag: {error}", file.display()));
    let mut value: Json = serde_json::from_str(&text).map_err(wrong)?;
    // What `get --json` prints has the flag inside its record.
    if let Some(flag) = value.get_mut("flag") {
        value = flag.take();
    }
    serde_json::from_value(value).map_err(wrong)
}

/// One line that says what a flag does.
pub fn described(flag: &Flag) -> String {
    let conditions = flag.rules.iter().filter(|rule| rule.when.is_some()).count();
    let mut parts = Vec::new();
    if !flag.enabled {
        parts.push("disabled".to_owned());
    }
    if conditions > 0 {
        parts.push(crate::error::counted(conditions, "rule"));
    }
    parts.extend(flag.rules.iter().filter(|rule| rule.when.is_none()).map(|rule| then(&rule.then)));
    parts.push(format!("else {}", flag.default));
    parts.join(", ")
}

fn then(then: &Then) -> String {
    match then {
        Then::Variant(variant) => variant.clone(),
        Then::Split(split) => {
            let shares: Vec<String> =
                shares(split).map(|(variant, share)| format!("{variant}={}", percent(share))).collect();
            format!("split {}", shares.join(","))
        }
    }
}

/// The whole flag, for people.
pub fn lines(flag: &Flag) -> Vec<String> {
    let mut lines: Vec<String> = flag.description.iter().map(|text| format!("  {text}")).collect();
    lines.extend(flag.variants.iter().map(|(name, value)| format!("  variant {name} = {value}")));
    for (number, rule) in flag.rules.iter().enumerate() {
        let when = rule.when.as_deref().unwrap_or("everybody");
        let layer = match &rule.then {
            Then::Split(split) => format!(" (layer {})", split.layer),
            Then::Variant(_) => String::new(),
        };
        lines.push(format!("  rule {}: {when} -> {}{layer}", number + 1, then(&rule.then)));
    }
    lines.push(format!("  else: {}", flag.default));
    lines
}

/// Names in double quotes: people who come from other languages mean texts by them.
pub fn quoted(flag: &Flag) -> Vec<String> {
    let mut found = Vec::new();
    for text in flag.rules.iter().filter_map(|rule| rule.when.as_deref()) {
        let mut in_text = false;
        let mut name: Option<String> = None;
        for c in text.chars() {
            match (c, &mut name) {
                ('\'', None) => in_text = !in_text,
                ('"', Some(_)) => found.extend(name.take()),
                ('"', None) if !in_text => name = Some(String::new()),
                (c, Some(name)) => name.push(c),
                _ => {}
            }
        }
    }
    found
}
