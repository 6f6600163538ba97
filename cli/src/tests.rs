use clap::CommandFactory;

use super::*;

fn parse(line: &str) -> Result<Arguments, clap::Error> {
    Arguments::try_parse_from(std::iter::once("coeval").chain(line.split_whitespace()))
}

#[test]
fn the_command_line_is_consistent() {
    Arguments::command().debug_assert();
}

#[test]
fn global_options_stand_before_and_after_the_command() {
    for line in ["-C shop --env prod --json validate", "validate -C shop --env prod --json"] {
        let Arguments { global, command } = parse(line).unwrap();
        assert_eq!(global.project_dir, PathBuf::from("shop"), "{line}");
        assert_eq!(global.env.as_deref(), Some("prod"), "{line}");
        assert!(global.json && matches!(command, Command::Validate), "{line}");
    }
}

#[test]
fn what_is_not_understood_is_a_usage_error() {
    fn check(line: &str, expected: &str) {
        let error = parse(line).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{line}");
        assert!(error.to_string().contains(expected), "{line}: {error}");
    }
    check("valdate", "validate");
    check("ingest", "<SOURCE>");
    check("features get", "<SERVICE>");
    check("materialize", "--through");
    check("model deploy delay", "<VERSION>");
    check("model deploy delay one --why x", "invalid value 'one'");
    check("rollout promote delay 2", "--why <TEXT>");
    check("rollout rollback delay", "--why <TEXT>");
    check("--color green validate", "always");
    check("rollout show", "<MODEL>");
    check("rollout shadow delay 2 --why x --dataset june --without-evaluation", "cannot be used with");
    check("rollout canary delay 2 --why x --buckets 5000..10", "FROM..TO");
    check("rollout acknowledge delay --why x", "<FEATURES>");
}

#[test]
fn rows_and_metrics_are_repeated() {
    let Arguments { command, .. } = parse("features get buying --row a=1,b=2 --row a=3 --at 2024-01-01").unwrap();
    let Command::Features(features::FeaturesCommand::Get(get)) = command else { panic!("not `features get`") };
    assert_eq!(get.ask.rows, ["a=1,b=2", "a=3"]);
    assert_eq!(get.ask.at.as_deref(), Some("2024-01-01"));
    let line = "model register m f.pt --author me --metric auc=0.5 --metric loss=1e-3";
    let Command::Model(model::ModelCommand::Register(register)) = parse(line).unwrap().command else {
        panic!("not `model register`")
    };
    assert_eq!(register.metrics, [("auc".to_owned(), 0.5), ("loss".to_owned(), 1e-3)]);
}
