//! Slow, plain integers that judge the fast ones in tests, and what *nearest* means, in terms of distances.

use std::cmp::Ordering;

/// Enough for the largest float64 in units of the smallest, times a count and a power of ten.
const DIGITS: usize = 84;

/// An integer in two's complement, 32 bits to a digit, lowest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Integer([u32; DIGITS]);

impl Integer {
    pub const ZERO: Integer = Integer([0; DIGITS]);

    pub fn new(x: i128) -> Integer {
        let mut digits = [if x < 0 { u32::MAX } else { 0 }; DIGITS];
        (0..4).for_each(|i| digits[i] = (x >> (32 * i)) as u32);
        Integer(digits)
    }

    /// A float in units of the smallest one; infinity counts as what would follow the largest.
    pub fn of_float(x: f64) -> Integer {
        let units = if x.is_infinite() {
            Integer::new(1).shifted(1024 + 1074)
        } else if x.abs() < f64::MIN_POSITIVE * 2.0 {
            Integer::new(i128::from(x.abs().to_bits()))
        } else {
            let exponent = (x.to_bits() >> 52 & 0x7ff) as usize;
            let significand = (x.to_bits() & ((1 << 52) - 1)) + (1 << 52);
            Integer::new(i128::from(significand)).shifted(exponent - 1)
        };
        if x < 0.0 { Integer::ZERO.minus(&units) } else { units }
    }

    pub fn plus(&self, other: &Integer) -> Integer {
        let mut carry = 0;
        Integer(std::array::from_fn(|i| {
            carry += u64::from(self.0[i]) + u64::from(other.0[i]);
            let digit = carry as u32;
            carry >>= 32;
            digit
        }))
    }

    pub fn minus(&self, other: &Integer) -> Integer {
        self.plus(&Integer(other.0.map(|digit| !digit))).plus(&Integer::new(1))
    }

    pub fn times(&self, factor: u32) -> Integer {
        let mut carry = 0;
        Integer(std::array::from_fn(|i| {
            carry += u64::from(self.0[i]) * u64::from(factor);
            let digit = carry as u32;
            carry >>= 32;
            digit
        }))
    }

    pub fn shifted(&self, bits: usize) -> Integer {
        let digits = std::array::from_fn(|i| if i < bits / 32 { 0 } else { self.0[i - bits / 32] });
        Integer(digits).times(1 << (bits % 32))
    }

    pub fn is_not_negative(&self) -> bool {
        self.0[DIGITS - 1] >> 31 == 0
    }

    pub fn absolute(&self) -> Integer {
        if self.is_not_negative() { self.clone() } else { Integer::ZERO.minus(self) }
    }

    /// Compares two that are not negative.
    fn compare(&self, other: &Integer) -> Ordering {
        self.0.iter().rev().cmp(other.0.iter().rev())
    }
}

/// Asserts that `result` is the float64 nearest to `sum` / `divisors`, `sum` being in units of the smallest float64: no
/// neighbour is nearer, and one that is just as near has an odd significand.
#[track_caller]
pub fn assert_nearest(result: f64, sum: &Integer, divisors: &[u32]) {
    assert!(!result.is_nan() && (result != 0.0 || result.is_sign_positive()), "{result} is no canonical number");
    let distance = |x: f64| {
        let scaled = divisors.iter().fold(Integer::of_float(x), |product, divisor| product.times(*divisor));
        sum.minus(&scaled).absolute()
    };
    let own = distance(result);
    for neighbour in [result.next_up(), result.next_down()] {
        if neighbour == result {
            continue;
        }
        match own.compare(&distance(neighbour)) {
            Ordering::Less => {}
            Ordering::Equal => assert_eq!(result.to_bits() & 1, 0, "{result} and {neighbour} tie: even wins"),
            Ordering::Greater => panic!("{neighbour} is nearer than {result}"),
        }
    }
}

#[test]
fn the_oracle_agrees_with_the_hardware_on_two_numbers() {
    for (x, y) in [(0.1, 0.2), (1e16, 1.0), (1e16, 3.0), (-1e300, 1e284), (5e-324, -1e-308), (f64::MAX, f64::MAX)] {
        assert_nearest(x + y, &Integer::of_float(x).plus(&Integer::of_float(y)), &[]);
        assert_eq!(Integer::of_float(x).plus(&Integer::of_float(y)).minus(&Integer::of_float(y)), Integer::of_float(x));
    }
    for (x, n) in [(1.0, 3), (2.0, 3), (1e-323, 4), (-7.25, 10)] {
        assert_nearest(x / f64::from(n), &Integer::of_float(x), &[n]);
    }
}

#[test]
#[should_panic(expected = "is nearer than")]
fn the_oracle_refuses_a_neighbour() {
    assert_nearest((0.1_f64 + 0.2).next_up(), &Integer::of_float(0.1).plus(&Integer::of_float(0.2)), &[]);
}

#[test]
#[should_panic(expected = "even wins")]
fn the_oracle_refuses_the_odd_one_of_a_tie() {
    assert_nearest(1e16_f64.next_up(), &Integer::of_float(1e16).plus(&Integer::new(1).shifted(1074)), &[]);
}
