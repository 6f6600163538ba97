//! A rollout in words.

use serde_json::Value as Json;

use crate::output::Output;

/// Entries of the past that are told to a person; `--json` has more.
const PAST_MAX: usize = 20;

fn text<'a>(json: &'a Json, key: &str) -> &'a str {
    json[key].as_str().unwrap_or("")
}

fn list(json: &Json) -> impl Iterator<Item = &Json> {
    json.as_array().into_iter().flatten()
}

/// `why, by whom, when (entry 12)`.
fn said(fact: &Json) -> String {
    let why = fact["why"].as_str().map_or_else(String::new, |why| format!("{why}, "));
    format!("{why}by {} at {} (entry {})", text(fact, "who"), text(fact, "at"), fact["entry"])
}

pub fn tell(report: &Json, output: &Output) {
    let model = text(report, "model");
    let champion = &report["champion"];
    match champion["version"].as_u64() {
        Some(version) => {
            output.line(format!("{model}: version {version} is the champion: {}", said(&champion["since"])))
        }
        None => output.line(format!("{model}: no version has the traffic")),
    }
    if let Some(version) = report["previous"]["version"].as_u64() {
        output.line(format!(
            "a rollback goes to version {version}, which is kept until {}",
            text(&report["previous"], "kept_until")
        ));
    }
    if !report["off"].is_null() {
        output.line(format!("OFF: the declared fallback answers everybody: {}", said(&report["off"])));
    }
    let running = &report["running"];
    if running.is_null() {
        output.line("no rollout runs");
    } else {
        tell_running(running, output);
    }
    if let Some(problem) = report["control_log"]["problem"].as_str() {
        let age = report["control_log"]["age_s"].as_f64().unwrap_or(0.0);
        output.note(format!("warning: this gateway has not read the control log for {age:.0} s: {problem}"));
    }
    let past: Vec<&Json> = list(&report["history"]).collect();
    if !past.is_empty() {
        let rows: Vec<Vec<String>> = past[past.len().saturating_sub(PAST_MAX)..].iter().map(|line| row(line)).collect();
        output.table(&["ENTRY", "WHEN", "WHAT", "WHO", "WHY"], &rows);
    }
}

fn tell_running(running: &Json, output: &Output) {
    let share = 100.0 * running["share"].as_f64().unwrap_or(0.0);
    output.line(format!(
        "version {} is rolled out against version {}: {} ({share:.2} % of the buckets), begun {}",
        running["version"],
        running["champion"],
        text(running, "stage"),
        said(&running["begun"])
    ));
    if !running["held"].is_null() {
        let held = &running["held"];
        let reasons: Vec<&str> = list(&held["reasons"]).filter_map(Json::as_str).collect();
        output.line(format!("HELD by the {}: {}; {}", text(held, "by"), reasons.join("; "), said(&held["since"])));
    }
    let judged = &running["judged"];
    if judged.is_null() {
        output.line("not judged yet");
        return;
    }
    let reasons: Vec<&str> = list(&judged["judgement"]["reasons"]).filter_map(Json::as_str).collect();
    output.line(format!("{}: {}", text(&judged["judgement"], "decision"), reasons.join("; ")));
    let criteria: Vec<Vec<String>> = list(&judged["judgement"]["criteria"])
        .map(|criterion| {
            let units = criterion["units"].to_string();
            vec![
                text(criterion, "name").to_owned(),
                text(criterion, "verdict").to_uppercase(),
                units,
                text(criterion, "text").to_owned(),
            ]
        })
        .collect();
    output.table(&["CRITERION", "VERDICT", "COUNTED", "NUMBERS"], &criteria);
    list(&judged["problems"]).filter_map(Json::as_str).for_each(|problem| output.note(format!("warning: {problem}")));
}

fn row(line: &Json) -> Vec<String> {
    let version = line["version"].as_u64().map_or_else(String::new, |version| format!(" version {version}"));
    let to = match &line["to"] {
        Json::Object(canary) => canary
            .get("canary")
            .map_or_else(String::new, |to| format!(" to {} %", to["share"].as_f64().unwrap_or(0.0) / 100.0)),
        Json::String(stage) => format!(" in {stage}"),
        _ => String::new(),
    };
    let ending = line["ending"].as_str().map_or_else(String::new, |ending| format!(" ({ending})"));
    let kind = text(line, "kind").replace(['_'], " ");
    let reasons: Vec<&str> = list(&line["reasons"]).filter_map(Json::as_str).collect();
    let why = line["why"].as_str().map_or_else(|| reasons.join("; "), str::to_owned);
    vec![
        line["entry"].to_string(),
        text(line, "at").to_owned(),
        format!("{kind}{version}{to}{ending}"),
        text(line, "who").to_owned(),
        why,
    ]
}

pub fn tell_plan(report: &Json, output: &Output) {
    output.line(format!(
        "{}: version {} against the champion, version {}",
        text(report, "model"),
        report["version"],
        report["champion"]
    ));
    let plan = &report["plan"];
    let rows: Vec<Vec<String>> = list(&plan["needs"])
        .map(|need| {
            let step = need["step"].as_u64().map_or_else(String::new, |step| format!("step {}", step + 1));
            let needed = need["needed"].as_u64().map_or_else(|| "never".to_owned(), |needed| needed.to_string());
            let days = need["days"].as_f64().map_or_else(|| "never".to_owned(), |days| format!("{days:.1}"));
            vec![text(need, "name").to_owned(), step, needed, text(need, "counted").to_owned(), days]
        })
        .collect();
    output.table(&["CRITERION", "STEP", "NEEDED", "OF", "DAYS"], &rows);
    match plan["days"].as_f64() {
        Some(days) => output.line(format!("about {days:.1} days in all, nine times in ten")),
        None => output.line("it would never end by its criteria"),
    }
    list(&plan["warnings"]).filter_map(Json::as_str).for_each(|warning| output.note(format!("warning: {warning}")));
    list(&report["notes"]).filter_map(Json::as_str).for_each(|note| output.note(format!("note: {note}")));
}
