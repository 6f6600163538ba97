//! A rollout is stopped by a row that was served wrong, and by nothing else.

use super::*;
use crate::rollout::skew::{Asked as SkewAsked, Known, look};

impl World {
    /// Rows of a version of the model, logged.
    async fn put(&self, number: u64, logged: &Logged, model: &str) {
        let at = logged.times(names::AT).unwrap();
        let header = Header {
            format: FORMAT,
            project: "p".into(),
            gateway: "127.0.0.1:1".into(),
            incarnation: "life".into(),
            service: "all".into(),
            semantic_digest: self.service().semantic_digest.to_string(),
            model: Some(model.into()),
            hashed: Vec::new(),
            first_at: at[0],
            last_at: at[at.len() - 1],
            first_time: at[0] + 1_000,
            last_time: at[at.len() - 1] + 1_000,
            rows: at.len() as u64,
        };
        let name = FileName { first_at: header.first_at, last_at: header.last_at, incarnation: "life".into(), number };
        let mut bytes = Vec::new();
        encode(&header, &logged.batch.schema(), std::slice::from_ref(&logged.batch), &mut bytes).unwrap();
        let path = Place::of("all", at[0]).folder(&self.engine.project_path()).join(name.to_string());
        self.store.put(&path, bytes.into()).await.unwrap();
    }

    fn skew_asked(&self, logged_from: Micros) -> SkewAsked {
        let versions = BTreeMap::from([(1, self.plan.model("scorer").unwrap().clone())]);
        SkewAsked { service: self.service().clone(), model: "scorer".into(), versions, logged_from }
    }
}

#[tokio::test]
async fn every_file_is_looked_at_once_and_a_wrong_row_names_its_feature_and_minute() {
    let world = World::new().await;
    let rows = in_time();
    let served = world.served(&rows).await;
    let (half, all) = (rows.len() / 2, rows.len());
    world.put(1, &served.slice(0, half), "scorer").await;
    let asked = world.skew_asked(NOON - HOUR);
    let mut known = Known::default();
    let found = look(&world.engine, &world.plan, &asked, &known).await.unwrap();
    assert_eq!((found.audited_rows, found.skew_rows, found.is_behind), (half as u64, 0, false));
    known.add(found);
    // Nothing new; then a file with one wrong bit, and one of another model.
    let found = look(&world.engine, &world.plan, &asked, &known).await.unwrap();
    assert_eq!(found.audited_rows, 0);
    known.add(found);
    let name = names::feature("load:total_6h");
    let flip = |row: usize, x: f64| if row == half + 3 { f64::from_bits(x.to_bits() ^ 1) } else { x };
    let wrong = float(&served, &name, flip);
    world.put(2, &wrong.slice(half, all - half), "scorer").await;
    world.put(3, &float(&served, &name, |_, x| x + 1.0).slice(0, 5), "other").await;
    known.add(look(&world.engine, &world.plan, &asked, &known).await.unwrap());
    assert_eq!((known.audited_rows, known.skew_rows), (all as u64, 1));
    let bad = known.first_bad.as_ref().unwrap();
    assert_eq!((bad.feature.as_str(), bad.minute_us), ("load:total_6h", rows[half + 3].at / MINUTE * MINUTE));
    assert!(known.left_out.is_empty() && known.notes.is_empty(), "{known:?}");
    // Of a rollout that began later, these rows are none.
    let later = world.skew_asked(rows[all - 1].at + 1_001);
    let found = look(&world.engine, &world.plan, &later, &Known::default()).await.unwrap();
    assert_eq!((found.audited_rows, found.skew_rows), (0, 0));
}

#[tokio::test]
async fn rows_of_events_that_history_lacks_wait() {
    let world = World::new().await;
    // Click 101, of which history holds nothing yet.
    let early = world.blank(&[Asked { applied: Some(101), ..asked("a", 340, 101) }]);
    world.put(1, &early, "scorer").await;
    let asked = world.skew_asked(NOON - HOUR);
    let mut known = Known::default();
    for _ in 0..30 {
        let found = look(&world.engine, &world.plan, &asked, &known).await.unwrap();
        assert_eq!((found.audited_rows, found.left_out.len()), (0, 0));
        known.add(found);
    }
    // It never comes: they are left out, and that is told.
    known.add(look(&world.engine, &world.plan, &asked, &known).await.unwrap());
    assert_eq!(known.left_out, BTreeMap::from([(NotAudited::BeyondHistory, 1)]));
    assert_eq!((known.audited_rows, known.skew_rows), (0, 0));
}
