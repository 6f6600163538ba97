use super::*;
use crate::counts::{Counter, Outcome, Validity, bucket_of_row};
use crate::random::Random;

fn buckets(rows: usize) -> Vec<u8> {
    (0..rows as u64).map(bucket_of_row).collect()
}

fn plain(buckets: &[u8]) -> Rows<'_> {
    Rows { buckets, validity: Validity::All, flags: None }
}

fn normals(rows: usize, seed: u64) -> Vec<f64> {
    let mut random = Random::new(seed);
    (0..rows).map(|_| random.normal()).collect()
}

fn builder(kind: Kind, stream: u64) -> Builder {
    Builder::new(kind, Options::default(), stream).unwrap()
}

const FLOATS: Kind = Kind::Numbers(Scale::Float64);

#[test]
fn a_sample_chooses_edges_as_all_values_would() {
    let values = normals(300_000, 1);
    let buckets = buckets(values.len());
    let mut first = builder(FLOATS, 0);
    values.chunks(7_001).zip(buckets.chunks(7_001)).for_each(|(values, buckets)| {
        first.add_numbers(values, &plain(buckets)).unwrap();
    });
    let layout = Arc::new(first.layout().unwrap());
    let mut counter = Counter::new(layout.clone());
    counter.add_numbers(&values, &plain(&buckets)).unwrap();
    let totals = counter.counts().parts()[0].totals();
    assert_eq!((totals.len(), totals[0], totals[21]), (22, 0, 0), "ends are those of all values, not of the sample");
    assert!(totals[1..21].iter().all(|count| (13_000..17_000).contains(count)), "{totals:?}");
    // What does not depend on edges is exact after one pass.
    let (one, two) = (first.profile().unwrap(), first.profile_of(layout, counter.take()).unwrap());
    assert_eq!(one.reference().outcomes(), two.reference().outcomes());
    let [one, two] = [&one, &two].map(|profile| &profile.reference().parts()[0]);
    assert_eq!((&one.moments, &one.distinct), (&two.moments, &two.distinct));
    assert_eq!(one.totals().iter().sum::<u64>(), 8_192);
}

#[test]
fn pieces_merge_in_any_order() {
    let pieces: Vec<Builder> = (0..4)
        .map(|stream| {
            let values = normals(20_000, stream);
            let mut builder = builder(FLOATS, stream);
            builder.add_numbers(&values, &plain(&buckets(values.len()))).unwrap();
            builder
        })
        .collect();
    let merged = |order: [usize; 4]| {
        let mut all = pieces[order[0]].clone();
        order[1..].iter().for_each(|piece| all.merge(pieces[*piece].clone()).unwrap());
        all.profile().unwrap()
    };
    let profile = merged([0, 1, 2, 3]);
    assert_eq!(profile, merged([3, 1, 0, 2]));
    let mut pair = pieces[2].clone();
    pair.merge(pieces[3].clone()).unwrap();
    let mut nested = pieces[1].clone();
    nested.merge(pair).unwrap();
    nested.merge(pieces[0].clone()).unwrap();
    assert_eq!(profile, nested.profile().unwrap());
    assert_eq!(pieces[0].clone().merge(builder(Kind::Presence, 9)), Err(DriftError::OtherLayout));
}

#[test]
fn profiles_are_small_and_come_back() {
    let values = normals(50_000, 3);
    let of_rows = buckets(values.len());
    let check = |mut builder: Builder, most: usize| {
        let profile = builder.profile().unwrap();
        let text = serde_json::to_string(&profile).unwrap();
        assert!(text.len() <= most, "{} bytes", text.len());
        assert_eq!(serde_json::from_str::<Profile>(&text).unwrap(), profile);
    };
    let mut floats = builder(FLOATS, 0);
    floats.add_numbers(&values, &plain(&of_rows)).unwrap();
    check(floats, 9_000);

    let mut random = Random::new(4);
    let texts: Vec<String> = (0..50_000).map(|_| format!("c{}", libm::exp(9.0 * random.unit()) as u64)).collect();
    let mut categories = builder(Kind::Categories, 0);
    categories.add_texts(texts.iter().map(|text| text.as_bytes()), &plain(&of_rows)).unwrap();
    check(categories, 50_000);

    let vectors: Vec<f32> = values[..32_000].iter().map(|x| *x as f32).collect();
    let mut of_vectors = builder(Kind::Vectors { dimension: 32 }, 0);
    of_vectors.add_vectors(&vectors, &plain(&of_rows[..1_000])).unwrap();
    check(of_vectors, 60_000);

    let mut presence = builder(Kind::Presence, 0);
    presence.add_presence(&plain(&of_rows)).unwrap();
    check(presence, 2_000);
}

#[test]
fn a_profile_of_nothing_is_one() {
    for kind in [FLOATS, Kind::Numbers(Scale::Bool), Kind::Categories, Kind::Vectors { dimension: 3 }, Kind::Presence] {
        let mut builder = builder(kind, 0);
        let nothing = Rows { buckets: &[1, 2], validity: Validity::Bitmap { bytes: &[0], offset: 0 }, flags: None };
        match kind {
            Kind::Numbers(Scale::Bool) => builder.add_numbers(&[false; 2], &nothing).unwrap(),
            Kind::Numbers(_) => builder.add_numbers(&[0.0; 2], &nothing).unwrap(),
            Kind::Categories => builder.add_texts([&b""[..]; 2].into_iter(), &nothing).unwrap(),
            Kind::Vectors { .. } => builder.add_vectors(&[0.0; 6], &nothing).unwrap(),
            Kind::Presence => builder.add_presence(&nothing).unwrap(),
        }
        let profile = builder.profile().unwrap();
        assert_eq!(profile.reference().outcomes().total(Outcome::Null), 2);
        assert_eq!(profile.layout().parts() > 0, kind != Kind::Presence);
    }
}

#[test]
fn training_says_how_much_is_never_seen() {
    // Half of the rows have frequent categories, the others new ones, of a tail of this many rows.
    for rows in [2_000, 10_000, 40_000] {
        let mut random = Random::new(5);
        let mut text = |i: usize| match i % 2 {
            0 => format!("tail {}", random.below(1 << 40)),
            _ => format!("frequent {}", i % 3),
        };
        let mut texts = || (0..rows).map(&mut text).collect::<Vec<String>>();
        let (training, serving) = (texts(), texts());
        let buckets = buckets(rows);
        let mut builder = builder(Kind::Categories, 0);
        builder.add_texts(training.iter().map(|text| text.as_bytes()), &plain(&buckets)).unwrap();
        let profile = builder.profile().unwrap();
        let layout = profile.layout().clone();
        let Layout::Categories(categories) = &*layout else { unreachable!() };
        let unseen = |counts: &Counts| {
            let totals = counts.parts()[0].totals();
            totals[categories.unseen()] as f64 / totals.iter().sum::<u64>() as f64
        };
        let counted = |texts: &[String]| {
            let mut counter = Counter::new(layout.clone());
            counter.add_texts(texts.iter().map(|text| text.as_bytes()), &plain(&buckets)).unwrap();
            counter.take()
        };
        assert_eq!(categories.categories().len(), 3);
        assert_eq!(unseen(&counted(&training)), 0.0, "training has seen all of its own");
        let expected = unseen(&counted(&serving));
        assert!((unseen(profile.reference()) - expected).abs() < 0.02, "{rows}: {}", unseen(profile.reference()));
        let profile = builder.profile_of(layout.clone(), counted(&training)).unwrap();
        assert!((unseen(profile.reference()) - expected).abs() < 0.02, "{rows}: {}", unseen(profile.reference()));
    }
}

#[test]
fn options_have_bounds() {
    let with = |options| Builder::new(Kind::Vectors { dimension: 8 }, options, 0).map(|_| ()).unwrap_err().to_string();
    let plain = Options::default();
    for (options, expected) in [
        (Options { bins: 21, ..plain }, "21 bins are not within what a profile can hold, which is at most 20"),
        (Options { categories: 255, ..plain }, "255 categories"),
        (Options { projections: 17, ..plain }, "17 projections"),
        (Options { sample: 0, ..plain }, "0 sample"),
    ] {
        let error = with(options);
        assert!(error.starts_with(expected), "{error}");
    }
    assert!(Builder::new(Kind::Vectors { dimension: 0 }, plain, 0).is_err());
}

#[test]
fn labels_are_cut_where_characters_end() {
    assert_eq!(label("ü".repeat(40).as_bytes()).len(), 64);
    assert_eq!(&*label(format!("a{}", "ü".repeat(40)).as_bytes()), format!("a{}", "ü".repeat(31)).as_str());
    assert!(label(&[0xff; 100]).len() <= LABEL_BYTES_MAX);
}
