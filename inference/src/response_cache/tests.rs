use proptest::prelude::*;

use super::*;
use crate::tensor::TensorData;

const TTL: Duration = Duration::from_secs(60);

fn scope() -> Scope {
    Scope::new(PARTS)
}

const PARTS: ScopeParts<'_> =
    ScopeParts { tenant: "shop", model: "sha256:00", plan: "plan1", outputs: &["p"], parameters: &[] };

fn input(name: &str, shape: &[usize], data: TensorData) -> (String, Tensor) {
    (name.to_owned(), Tensor::try_new(shape.to_vec(), data).unwrap())
}

fn six(shape: &[usize]) -> TensorBatch {
    vec![input("x", shape, TensorData::Float32(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))]
}

fn one(data: TensorData) -> TensorBatch {
    vec![input("x", &[1, 1], data)]
}

fn hex(key: Key) -> String {
    key.bytes().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// From Python's `hashlib`; the design note has them too. They change only with another `VERSION`.
#[test]
fn keys_are_those_that_were_published() {
    let check = |inputs: &TensorBatch, expected: &str| assert_eq!(hex(scope().key(inputs)), expected);
    check(&six(&[2, 3]), "c5891785709a8d6668216b93789ee269e17a9b6b4a754cc507340c0c0397b27c");
    check(&six(&[3, 2]), "f4681204334ef152effa7c999c6b73b9e7ba1aa7f5205ac6ecb627ca94b8ab80");
    let zero = |zero: f32| one(TensorData::Float32(vec![zero]));
    check(&zero(0.0), "cdb28503778a09587f7bbb769af2c9ac2d566e606819ab73a38476ed584077b4");
    check(&zero(-0.0), "0f553cb5d92021cb8901642d0e87c9392a1175c169a0b5ed7de9cc4acf3cbc24");
    check(&one(TensorData::Int32(vec![0])), "2595e981e520d3fb1210fd75345bf8969ac97fcdca2d504b7641b20a64e07f2b");
    check(&zero(f32::from_bits(0x7fc0_0000)), "48deaf7ac594e4e79aa7bc392fcf94c9f210d87f0763344e71ddc725746dcc63");
    check(&zero(f32::from_bits(0x7fc0_0001)), "744e7c7329a8ba8a3a2b0ba7c315ea6e3ea1419f74b7f41ac6c47057c381f2e8");
    let outputs = &["p", "q"];
    let parts = ScopeParts { outputs, parameters: &[("temperature", "0.5")], ..PARTS };
    let inputs = vec![
        input("dense", &[1, 2], TensorData::Float64(vec![0.5, -1.5])),
        input("carrier", &[1, 1], TensorData::Int64(vec![-7])),
        input("on", &[1, 2], TensorData::Bool(vec![true, false])),
    ];
    assert_eq!(hex(Scope::new(parts).key(&inputs)), "92cb94c3e4dc7983f049a69cc2dfec6f23f6a6b28b14efb8cffb87a84451569b");
}

/// What one thing is never taken for.
#[test]
fn every_part_tells_keys_apart() {
    let row = |name: &str| vec![input(name, &[1, 2], TensorData::Float32(vec![1.0, 2.0]))];
    let key = |parts: ScopeParts<'_>| Scope::new(parts).key(&row("x"));
    let all = [
        key(PARTS),
        key(ScopeParts { tenant: "shop2", ..PARTS }),
        key(ScopeParts { model: "sha256:01", ..PARTS }),
        key(ScopeParts { plan: "plan2", ..PARTS }),
        // The same letters, cut elsewhere.
        key(ScopeParts { tenant: "shopsha256:00", model: "", ..PARTS }),
        key(ScopeParts { outputs: &["p", "q"], ..PARTS }),
        key(ScopeParts { outputs: &["pq"], ..PARTS }),
        key(ScopeParts { outputs: &[], ..PARTS }),
        key(ScopeParts { outputs: &[], parameters: &[("p", "")], ..PARTS }),
        key(ScopeParts { parameters: &[("a", "1")], ..PARTS }),
        key(ScopeParts { parameters: &[("a1", "")], ..PARTS }),
        scope().key(&row("y")),
        scope().key(&vec![input("x", &[2, 1], TensorData::Float32(vec![1.0, 2.0]))]),
        scope().key(&vec![input("x", &[2], TensorData::Float32(vec![1.0, 2.0]))]),
        // The same bytes as integers, and as one number.
        scope().key(&vec![input("x", &[1, 2], TensorData::Int32(vec![0x3f80_0000, 0x4000_0000]))]),
        scope().key(&vec![input("x", &[1, 1], TensorData::Int64(vec![0x4000_0000_3f80_0000]))]),
        scope().key(&[row("x"), row("x")].concat()),
        scope().key(&vec![]),
    ];
    let distinct: std::collections::HashSet<Key> = all.iter().copied().collect();
    assert_eq!(distinct.len(), all.len());
}

proptest! {
    /// A row has its key wherever it lies, and rows that differ in a bit have others.
    #[test]
    fn a_rows_key_is_its_own(rows in prop::collection::vec(prop::collection::vec(any::<u32>(), 3), 1..6)) {
        let floats = |rows: &[Vec<u32>]| {
            let values = rows.iter().flatten().map(|bits| f32::from_bits(*bits)).collect();
            vec![input("x", &[rows.len(), 3], TensorData::Float32(values))]
        };
        let keys = scope().row_keys(&floats(&rows));
        for (row, key) in rows.iter().zip(&keys) {
            prop_assert_eq!(*key, scope().key(&floats(std::slice::from_ref(row))));
        }
        for (a, row) in rows.iter().enumerate() {
            for (b, other) in rows.iter().enumerate() {
                prop_assert_eq!(keys[a] == keys[b], row == other);
            }
        }
    }
}

fn key(number: u64) -> Key {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    Key(bytes)
}

fn row(value: f32) -> Row {
    Arc::new([Tensor::try_new(vec![1], TensorData::Float32(vec![value])).unwrap()])
}

#[test]
fn entries_end_with_their_time_and_with_that_of_what_they_came_from() {
    let cache = ResponseCache::new(1 << 20, TTL);
    let now = Instant::now();
    let fresh_for = Duration::from_secs(5);
    cache.put(cache.life(), key(1), row(1.0), now, None);
    cache.put(cache.life(), key(2), row(2.0), now, Some(now + fresh_for));
    cache.put(cache.life(), key(3), row(3.0), now, Some(now + TTL * 2));
    cache.put(cache.life(), key(4), row(4.0), now, Some(now));
    let known =
        |after: Duration| (1..5).map(|number| cache.get(&key(number), now + after).is_some()).collect::<Vec<_>>();
    let nanosecond = Duration::from_nanos(1);
    assert_eq!(known(fresh_for - nanosecond), [true, true, true, false]);
    assert_eq!(known(fresh_for), [true, false, true, false]);
    assert_eq!(known(TTL - nanosecond), [true, false, true, false]);
    assert_eq!(known(TTL), [false; 4]);
    let metrics = cache.metrics();
    assert_eq!((metrics.hits, metrics.misses, metrics.expired, metrics.entries, metrics.bytes), (7, 9, 3, 0, 0));
}

#[test]
fn nothing_of_a_life_is_found_after_it() {
    let cache = ResponseCache::new(1 << 20, TTL);
    let now = Instant::now();
    let before = cache.life();
    cache.put(before, key(1), row(1.0), now, None);
    assert!(cache.get(&key(1), now).is_some());
    cache.end_life();
    // What was under way comes too late.
    cache.put(before, key(2), row(2.0), now, None);
    assert!(cache.get(&key(1), now).is_none() && cache.get(&key(2), now).is_none());
    assert_eq!((cache.metrics().entries, cache.metrics().bytes), (0, 0));
    cache.put(cache.life(), key(1), row(3.0), now, None);
    assert_eq!(cache.get(&key(1), now).unwrap()[0], row(3.0)[0]);
}

#[test]
fn bytes_are_bounded_and_what_is_asked_for_stays() {
    let cache = ResponseCache::new(64 << 10, TTL);
    let now = Instant::now();
    cache.put(cache.life(), key(0), row(0.0), now, None);
    let each = cache.metrics().bytes;
    let mut kept = 0;
    for number in 1..5_000 {
        cache.put(cache.life(), key(number), row(1.0), now, None);
        kept += u64::from(cache.get(&key(0), now).is_some());
        assert!(cache.metrics().bytes <= 64 << 10);
    }
    let metrics = cache.metrics();
    assert_eq!(kept, 4_999, "it was asked for all the time");
    assert_eq!((metrics.entries * each, metrics.entries + metrics.evictions), (metrics.bytes, 5_000));
    assert!(metrics.bytes > 48 << 10, "{metrics:?}");
    // What would take everybody else's place is not taken.
    let large: Row = Arc::new([Tensor::zeros(crate::tensor::Dtype::Float64, 1, &[4_096])]);
    cache.put(cache.life(), key(9_999), large, now, None);
    assert!(cache.get(&key(9_999), now).is_none() && cache.get(&key(0), now).is_some());
}

#[test]
fn a_life_ends_for_all_threads_at_once() {
    let cache = ResponseCache::new(1 << 20, TTL);
    let now = Instant::now();
    // The value of an entry is the life that it was put in.
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let cache = &cache;
            scope.spawn(move || {
                for round in 0..20_000_u64 {
                    let number = key((thread + round) % 16);
                    let life = cache.life();
                    if let Some(found) = cache.get(&number, now) {
                        let TensorData::Int64(values) = found[0].data() else { panic!("another type") };
                        assert!(values[0].unsigned_abs() >= life.0, "of an earlier life");
                    }
                    let value = TensorData::Int64(vec![i64::try_from(life.0).unwrap()]);
                    cache.put(life, number, Arc::new([Tensor::try_new(vec![1], value).unwrap()]), now, None);
                    if round % 500 == 0 {
                        cache.end_life();
                    }
                }
            });
        }
    });
}
