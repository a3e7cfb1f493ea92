//! Where a value is on an axis.
//!
//! Enters: a range. Leaves: shares of the axis' length, and ticks with their labels. Invariant: ticks lie
//! within the range.

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
}

/// A range of values and where they go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale {
    kind: Kind,
    low: f64,
    high: f64,
}

/// A place on an axis: its value, what stands there.
pub(super) type Tick = (f64, String);

impl Scale {
    pub(super) fn new(kind: Kind, low: f64, high: f64) -> Self {
        Self { kind, low, high }
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
            Kind::Log => v.max(f64::MIN_POSITIVE).log10(),
            Kind::Nines => nines(v),
            Kind::Counts => (v.max(0.0) / 10.0).ln_1p(),
        };
        let (low, high) = (place(self.low), place(self.high));
        if high > low { (place(value) - low) / (high - low) } else { 0.5 }
    }

    fn within(&self, value: f64) -> bool {
        let air = 1e-9;
        (-air..=1.0 + air).contains(&self.at(value))
    }

    /// About so many.
    pub(super) fn ticks(&self, about: usize) -> Vec<Tick> {
        let values = match self.kind {
            Kind::Linear => linear(self.low, self.high, about),
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
        scale.ticks(about).into_iter().map(|(_, label)| label).collect()
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
}
