//! Vectors as a few numbers each: the norm, the cosine to the training set's mean direction, and seeded projections.
//!
//! A distribution over a thousand dimensions has no histogram. Its projections have, and two distributions that agree in
//! every projection are equal (Cramér and Wold 1936); a handful of random ones finds what a handful can. Signs of ±1 are
//! as good as normal weights (Achlioptas 2003) and cost no multiplication.

use serde::{Deserialize, Serialize};

use crate::histogram::Edges;
use crate::random::Random;

pub const DIMENSION_MAX: usize = 16_384;
pub const PROJECTIONS_MAX: usize = 16;

/// Norm and cosine come before the projections.
const PROJECTIONS_FROM: usize = 2;

/// Sums run in this many lanes: in a fixed order, so that every machine gets the same bits, and one that vector units
/// like.
const LANES: usize = 8;

/// What vectors are measured against.
#[derive(Debug, Clone, PartialEq)]
pub struct Directions {
    /// The mean of training, of length one; zero where there is none.
    centroid: Vec<f32>,
    seed: u64,
    /// Sign bits, a row of `dimension` for each projection: what `seed` says.
    signs: Vec<u32>,
    projections: usize,
}

impl Directions {
    pub fn new(centroid: Vec<f32>, projections: usize, seed: u64) -> Result<Directions, &'static str> {
        if centroid.is_empty() || centroid.len() > DIMENSION_MAX {
            return Err("vectors have no dimension, or more than are profiled");
        }
        if projections > PROJECTIONS_MAX {
            return Err("a profile of vectors has more projections than allowed");
        }
        let mut random = Random::of(seed, 1);
        let signs = (0..projections * centroid.len()).map(|_| (random.bits() >> 63) as u32 * 0x8000_0000).collect();
        Ok(Directions { centroid, seed, signs, projections })
    }

    /// The directions of a sample of vectors.
    pub fn of_sample<'a>(
        sample: impl Iterator<Item = &'a [f32]>,
        dimension: usize,
        projections: usize,
        seed: u64,
    ) -> Result<Directions, &'static str> {
        let mut sum = vec![0.0_f64; dimension];
        for vector in sample {
            sum.iter_mut().zip(vector).for_each(|(sum, x)| *sum += f64::from(*x));
        }
        let norm = sum.iter().map(|x| x * x).sum::<f64>().sqrt();
        let unit = if norm.is_normal() { 1.0 / norm } else { 0.0 };
        Directions::new(sum.iter().map(|x| (x * unit) as f32).collect(), projections, seed)
    }

    pub fn dimension(&self) -> usize {
        self.centroid.len()
    }

    pub fn parts(&self) -> usize {
        PROJECTIONS_FROM + self.projections
    }

    pub fn name(&self, part: usize) -> String {
        match part {
            0 => "norm".into(),
            1 => "cosine".into(),
            other => format!("projection {}", other - PROJECTIONS_FROM),
        }
    }

    /// The numbers of a vector, one for each part, or false where it has a component that is no number.
    pub fn measure(&self, vector: &[f32], numbers: &mut [f64]) -> bool {
        let mut squares = [0.0_f64; LANES];
        let mut dots = [0.0_f64; LANES];
        for (xs, cs) in vector.chunks(LANES).zip(self.centroid.chunks(LANES)) {
            for (lane, (x, c)) in xs.iter().zip(cs).enumerate() {
                squares[lane] += f64::from(*x) * f64::from(*x);
                dots[lane] += f64::from(*x) * f64::from(*c);
            }
        }
        let norm = squares.iter().sum::<f64>().sqrt();
        if !norm.is_finite() {
            return false;
        }
        // The zero vector has no direction; none is nearest to all.
        let cosine = if norm > 0.0 { (dots.iter().sum::<f64>() / norm).clamp(-1.0, 1.0) } else { 0.0 };
        let scale = 1.0 / (self.dimension() as f64).sqrt();
        let projections = self.signs.chunks(self.dimension()).map(|signs| projection(vector, signs) * scale);
        numbers.iter_mut().zip([norm, cosine].into_iter().chain(projections)).for_each(|(number, x)| *number = x);
        true
    }
}

#[inline]
fn projection(vector: &[f32], signs: &[u32]) -> f64 {
    let mut lanes = [0.0_f32; LANES];
    let (whole, rest) = vector.as_chunks::<LANES>();
    let (whole_signs, rest_signs) = signs.as_chunks::<LANES>();
    for (xs, signs) in whole.iter().zip(whole_signs) {
        for lane in 0..LANES {
            lanes[lane] += f32::from_bits(xs[lane].to_bits() ^ signs[lane]);
        }
    }
    for (lane, (x, sign)) in rest.iter().zip(rest_signs).enumerate() {
        lanes[lane] += f32::from_bits(x.to_bits() ^ sign);
    }
    lanes.iter().map(|lane| f64::from(*lane)).sum()
}

/// Directions and the edges of their parts, as they are stored: signs are drawn again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Vectors {
    pub directions: Directions,
    /// One for each part.
    pub edges: Vec<Edges>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    centroid: Vec<f32>,
    seed: u64,
    edges: Vec<Edges>,
}

impl From<Vectors> for Stored {
    fn from(vectors: Vectors) -> Stored {
        Stored { centroid: vectors.directions.centroid, seed: vectors.directions.seed, edges: vectors.edges }
    }
}

impl TryFrom<Stored> for Vectors {
    type Error = &'static str;

    fn try_from(stored: Stored) -> Result<Vectors, &'static str> {
        let projections =
            stored.edges.len().checked_sub(PROJECTIONS_FROM).ok_or("a profile of vectors lacks norm or cosine")?;
        let directions = Directions::new(stored.centroid, projections, stored.seed)?;
        Ok(Vectors { directions, edges: stored.edges })
    }
}

impl Vectors {
    /// What tells it from others, for the digest.
    pub fn canonical(&self, out: &mut Vec<u8>) {
        out.extend(self.directions.seed.to_le_bytes());
        self.directions.centroid.iter().for_each(|x| out.extend(x.to_bits().to_le_bytes()));
        self.edges.iter().flat_map(|edges| edges.keys()).for_each(|key| out.extend(key.to_le_bytes()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vector_is_measured() {
        let sample = [[3.0_f32, 4.0, 0.0], [3.0, 4.0, 0.0]];
        let directions = Directions::of_sample(sample.iter().map(|x| &x[..]), 3, 4, 9).unwrap();
        let mut numbers = [0.0; 6];
        assert!(directions.measure(&[6.0, 8.0, 0.0], &mut numbers));
        assert_eq!(numbers[0], 10.0);
        assert!((numbers[1] - 1.0).abs() < 1e-6);
        for projection in &numbers[2..] {
            let possible = [14.0, 2.0, -2.0, -14.0].map(|x| x / 3.0_f64.sqrt());
            assert!(possible.iter().any(|x| (x - projection).abs() < 1e-9), "{projection}");
        }
        assert!(directions.measure(&[0.0; 3], &mut numbers) && numbers[1] == 0.0);
        assert!(!directions.measure(&[f32::NAN, 0.0, 0.0], &mut numbers));
    }

    #[test]
    fn projections_keep_lengths_in_the_mean() {
        let directions = Directions::new(vec![0.0; 100], 16, 3).unwrap();
        let vector: Vec<f32> = (0..100).map(|i| (i as f32).sin()).collect();
        let mut numbers = [0.0; 18];
        directions.measure(&vector, &mut numbers);
        let mean = numbers[2..].iter().map(|x| x * x).sum::<f64>() / 16.0;
        let expected = numbers[0] * numbers[0] / 100.0;
        assert!((0.4..2.5).contains(&(mean / expected)), "{mean} {expected}");
    }
}
