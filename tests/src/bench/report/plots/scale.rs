//! Where a value is on an axis.
//!
//! plotters has logarithmic axes, and none for quantiles or for counts from 0; its ticks are not those that the measurements
//! ask for. So this is its coordinate, for all axes.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};

use crate::bench::report::number::tick;

/// How values become places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// As they are.
    Linear,
    /// By their logarithm; they are positive.
    Log,
    /// Quantiles, by how many nines they have.
    Nines,
    /// Counts from 0, which has a place though hundreds and ten thousands have theirs: log(1 + n/10).
    Counts,
    /// Rows from the top, from 0; what stands beside one is at its middle.
    Rows,
}

/// A range of values and where they go.
#[derive(Clone, Debug)]
pub(super) struct Scale {
    kind: Kind,
    low: f64,
    high: f64,
    ticks: Vec<Tick>,
}

/// A place on an axis: its value, what stands there.
pub(super) type Tick = (f64, String);

impl Scale {
    pub(super) fn new(kind: Kind, low: f64, high: f64) -> Self {
        let mut scale = Self { kind, low, high, ticks: Vec::new() };
        scale.ticks = scale.ticks_of(6);
        scale
    }

    /// Rows of these names.
    pub(super) fn rows(names: impl IntoIterator<Item = String>) -> Self {
        let ticks: Vec<Tick> =
            names.into_iter().enumerate().map(|(n, name)| (n as f64 + 0.5, name)).collect();
        Self { kind: Kind::Rows, low: 0.0, high: ticks.len() as f64, ticks }
    }

    /// With ticks at about so many values.
    pub(super) fn about(mut self, ticks: usize) -> Self {
        self.ticks = self.ticks_of(ticks);
        self
    }

    /// With ticks at these values.
    pub(super) fn at_these(mut self, ticks: Vec<Tick>) -> Self {
        self.ticks = ticks;
        self
    }

    pub(super) fn ticks(&self) -> &[Tick] {
        &self.ticks
    }

    pub(super) fn is_rows(&self) -> bool {
        self.kind == Kind::Rows
    }

    /// From 0, or from below it when values are, with some air above.
    pub(super) fn from_zero(values: impl IntoIterator<Item = f64>) -> Self {
        let (low, high) = range(values).unwrap_or((0.0, 1.0));
        let (low, high) = (low.min(0.0), high.max(0.0));
        let air = if high > low { (high - low) * 0.05 } else { 1.0 };
        Self::new(Kind::Linear, if low < 0.0 { low - air } else { 0.0 }, high + air)
    }

    /// Around what is there, on a logarithmic axis.
    pub(super) fn around(values: impl IntoIterator<Item = f64>) -> Self {
        let positive = values.into_iter().filter(|v| *v > 0.0);
        let (low, high) = range(positive).unwrap_or((1.0, 10.0));
        let air = (high / low).powf(0.04).max(1.02);
        Self::new(Kind::Log, low / air, high * air)
    }

    /// 0 at the beginning of the axis, 1 at its end.
    pub(super) fn at(&self, value: f64) -> f64 {
        let place = |v: f64| match self.kind {
            Kind::Linear => v,
            Kind::Rows => -v,
            Kind::Log => v.max(f64::MIN_POSITIVE).log10(),
            Kind::Nines => nines(v),
            Kind::Counts => (v.max(0.0) / 10.0).ln_1p(),
        };
        let (low, high) = match self.kind {
            Kind::Rows => (place(self.high), place(self.low)),
            _ => (place(self.low), place(self.high)),
        };
        if high > low { (place(value) - low) / (high - low) } else { 0.5 }
    }

    /// What is at a share of the axis' length.
    pub(super) fn value_at(&self, share: f64) -> f64 {
        let between = |low: f64, high: f64| low + (high - low) * share;
        match self.kind {
            Kind::Linear => between(self.low, self.high),
            Kind::Rows => between(self.high, self.low),
            Kind::Log => 10f64.powf(between(self.low.log10(), self.high.log10())),
            Kind::Nines => 1.0 - 10f64.powf(-between(nines(self.low), nines(self.high))),
            Kind::Counts => 10.0 * between((self.low / 10.0).ln_1p(), (self.high / 10.0).ln_1p()).exp_m1(),
        }
    }

    fn within(&self, value: f64) -> bool {
        let air = 1e-9;
        (-air..=1.0 + air).contains(&self.at(value))
    }

    /// About so many.
    fn ticks_of(&self, about: usize) -> Vec<Tick> {
        let values = match self.kind {
            Kind::Linear | Kind::Rows => linear(self.low, self.high, about),
            Kind::Log => self.log_ticks(about),
            Kind::Nines => vec![0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999],
            Kind::Counts => vec![0.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6],
        };
        let label = |value: f64| match self.kind {
            Kind::Nines => trimmed(value * 100.0),
            _ => tick(value),
        };
        values.into_iter().filter(|v| self.within(*v)).map(|v| (v, label(v))).collect()
    }

    #[expect(clippy::cast_possible_truncation, reason = "exponents of ten")]
    fn log_ticks(&self, about: usize) -> Vec<f64> {
        let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
        let ticks = |digits: &[f64]| -> Vec<f64> {
            let all = decades.clone().flat_map(|e| digits.iter().map(move |d| d * 10f64.powi(e)));
            all.filter(|v| self.within(*v)).collect()
        };
        let sets: [&[f64]; 4] = [&[1.0, 1.5, 2.0, 3.0, 5.0, 7.0], &[1.0, 2.0, 5.0], &[1.0, 3.0], &[1.0]];
        let found = sets.iter().map(|set| ticks(set)).find(|ticks| ticks.len() <= about + 1);
        match found {
            Some(ticks) if ticks.len() > 2 => ticks,
            _ => linear(self.low, self.high, about).into_iter().filter(|v| *v > 0.0).collect(),
        }
    }
}

impl Ranged for Scale {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    #[expect(clippy::cast_possible_truncation, reason = "pixels of a picture")]
    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        from + (self.at(*value) * f64::from(to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        // Between ticks there are no lines.
        if hint.weight().allow_light_points() {
            return Vec::new();
        }
        self.ticks.iter().map(|(value, _)| *value).collect()
    }

    fn range(&self) -> Range<f64> {
        self.low..self.high
    }
}

impl ValueFormatter<f64> for Scale {
    fn format_ext(&self, value: &f64) -> String {
        let found = self.ticks.iter().find(|(tick, _)| tick == value);
        found.map(|(_, label)| label.clone()).unwrap_or_default()
    }
}

/// 0.9 has one, 0.99 two.
pub(super) fn nines(quantile: f64) -> f64 {
    -(1.0 - quantile).max(1e-12).log10()
}

/// The smallest and the largest.
pub(super) fn range(values: impl IntoIterator<Item = f64>) -> Option<(f64, f64)> {
    let finite = values.into_iter().filter(|v| v.is_finite());
    finite.fold(None, |range, v| match range {
        None => Some((v, v)),
        Some((low, high)) => Some((v.min(low), v.max(high))),
    })
}

/// Multiples of 1, 2 or 5.
#[expect(clippy::cast_possible_truncation, reason = "as many as there are ticks, both ways from 0")]
fn linear(low: f64, high: f64, about: usize) -> Vec<f64> {
    let rough = (high - low) / about.max(1) as f64;
    if rough <= 0.0 || !rough.is_finite() {
        return Vec::new();
    }
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].iter().map(|d| d * power).find(|s| *s >= rough * 0.999).unwrap_or(power);
    ((low / step).ceil() as i64..=(high / step).floor() as i64).map(|n| n as f64 * step).collect()
}

/// `99.9` and not `99.90000000000001`.
fn trimmed(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(scale: Scale, about: usize) -> Vec<String> {
        scale.about(about).ticks().iter().map(|(_, label)| label.clone()).collect()
    }

    #[test]
    fn ticks_are_round_and_within() {
        assert_eq!(labels(Scale::new(Kind::Linear, 0.0, 31.0), 4), ["0", "10", "20", "30"]);
        assert_eq!(labels(Scale::new(Kind::Linear, -0.3, 0.3), 3), ["−0.2", "0", "0.2"]);
        assert_eq!(
            labels(Scale::new(Kind::Log, 20.0, 1200.0), 6),
            ["20", "50", "100", "200", "500", "1,000"]
        );
        assert_eq!(labels(Scale::new(Kind::Log, 90.0, 130.0), 5), ["90", "100", "110", "120", "130"]);
        assert_eq!(labels(Scale::new(Kind::Nines, 0.0, 0.9999), 6), ["0", "50", "90", "99", "99.9", "99.99"]);
        assert_eq!(labels(Scale::new(Kind::Counts, 0.0, 1e4), 6), ["0", "10", "100", "1,000", "10,000"]);
        assert_eq!(labels(Scale::new(Kind::Linear, 1.0, 1.0), 6), [""; 0]);
    }

    #[test]
    fn zero_has_a_place_among_counts_and_100_nines_have_none() {
        let rules = Scale::new(Kind::Counts, 0.0, 1e4);
        assert_eq!((rules.at(0.0), rules.at(1e4)), (0.0, 1.0));
        let third = rules.at(100.0);
        assert!((0.33..0.36).contains(&third), "{third}");
        assert!(nines(1.0).is_finite());
    }

    /// `value_at` undoes `at`, on every kind of axis.
    #[test]
    fn what_is_at_a_place_is_at_that_place() {
        let axes = [
            (Kind::Linear, 0.0, 31.0),
            (Kind::Log, 20.0, 1200.0),
            (Kind::Nines, 0.0, 0.999),
            (Kind::Counts, 0.0, 1e4),
            (Kind::Rows, 0.0, 5.0),
        ];
        for (kind, low, high) in axes {
            let scale = Scale::new(kind, low, high);
            for share in [0.0, 0.3, 1.0] {
                assert!((scale.at(scale.value_at(share)) - share).abs() < 1e-9, "{kind:?}");
            }
        }
    }
}
