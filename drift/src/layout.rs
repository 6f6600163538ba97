//! The frozen part of a profile: what is counted, and in which bins.

use serde::{Deserialize, Serialize};

use crate::categories::Categories;
use crate::directions::Vectors;
use crate::histogram::Edges;
use crate::number::Scale;
use crate::random::hash;

/// How the values of one feature or model output are counted. Frozen when the profile of a training set is made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// Whether there is a value, and nothing of it: lists, maps and structs.
    Presence,
    /// Numbers. Booleans are numbers of two values, and a time is its age at the request: a moment itself never comes
    /// back, so every distribution of moments drifts.
    Ordered {
        scale: Scale,
        edges: Edges,
    },
    /// Texts, and whatever else is only equal or not.
    Categories(Categories),
    Vectors(Vectors),
}

impl Layout {
    /// The distributions that are compared: one, or for a vector one for each of its numbers.
    pub fn parts(&self) -> usize {
        match self {
            Layout::Presence => 0,
            Layout::Ordered { .. } | Layout::Categories(_) => 1,
            Layout::Vectors(vectors) => vectors.edges.len(),
        }
    }

    pub fn bins(&self, part: usize) -> usize {
        match self {
            Layout::Presence => 0,
            Layout::Ordered { edges, .. } => edges.bins(),
            Layout::Categories(categories) => categories.bins(),
            Layout::Vectors(vectors) => vectors.edges.get(part).map_or(0, Edges::bins),
        }
    }

    /// Of a vector's number; other features have one distribution and need no name for it.
    pub fn part_name(&self, part: usize) -> Option<String> {
        match self {
            Layout::Vectors(vectors) => Some(vectors.directions.name(part)),
            _ => None,
        }
    }

    pub fn label(&self, part: usize, bin: usize) -> String {
        match self {
            Layout::Presence => String::new(),
            Layout::Ordered { scale, edges } => edges.label(bin, *scale),
            Layout::Categories(categories) => categories.label(bin),
            Layout::Vectors(vectors) => {
                vectors.edges.get(part).map_or_else(String::new, |edges| edges.label(bin, Scale::Float64))
            }
        }
    }

    /// Whether bins have an order, and with it a distribution function.
    pub fn is_ordered(&self) -> bool {
        !matches!(self, Layout::Categories(_))
    }

    pub fn name(&self) -> &'static str {
        match self {
            Layout::Presence => "presence",
            Layout::Ordered { scale: Scale::Float64, .. } => "float64",
            Layout::Ordered { scale: Scale::Int64, .. } => "int64",
            Layout::Ordered { scale: Scale::Bool, .. } => "bool",
            Layout::Categories(_) => "categories",
            Layout::Vectors(_) => "vectors",
        }
    }

    /// Counts of equal digests were counted in the same bins.
    pub fn digest(&self) -> u64 {
        let mut bytes = self.name().as_bytes().to_vec();
        match self {
            Layout::Presence => {}
            Layout::Ordered { edges, .. } => edges.keys().iter().for_each(|key| bytes.extend(key.to_le_bytes())),
            Layout::Categories(categories) => categories.canonical(&mut bytes),
            Layout::Vectors(vectors) => vectors.canonical(&mut bytes),
        }
        hash(&bytes)
    }
}
