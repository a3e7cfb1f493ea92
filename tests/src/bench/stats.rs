//! For each [`Metric`] of a report's runs a [`Summary`]: median and quartiles, of the values and of the ratios to the baseline.
//!
//! # Invariants
//! - A ratio is of two runs of the same round: what the machine did between rounds falls out of it.
//! - No runs give no summary.

use std::fmt;

use super::model::{Role, Run, Scenario};
use crate::load::Workload;

/// What can be read off a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Metric {
    /// Latency's median, in microseconds.
    P50,
    /// Its 90th percentile.
    P90,
    /// Its 99th.
    P99,
    /// Its 99.9th.
    P999,
    /// Operations per second.
    PerSecond,
    /// Payload in gigabits (10⁹) per second.
    Gbits,
    /// Processor seconds of all parts per gigabyte (10⁹) of payload.
    CpuPerGb,
    /// Those of the proxies alone.
    ProxyCpuPerGb,
    /// Processor seconds of all parts per 1,000 operations.
    CpuPerThousand,
    /// Those of the proxies alone.
    ProxyCpuPerThousand,
    /// Bytes of resident memory of a part per idle connection.
    Resident(Role),
    /// Bytes of TCP buffers per idle connection.
    TcpMemory,
    /// Bytes of kernel slabs per idle connection.
    Slab,
}

/// Which way is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// Less.
    Lower,
    /// More.
    Higher,
}

impl Metric {
    /// What is worth reading off a workload, the headline first.
    pub fn of(workload: Workload) -> &'static [Self] {
        use Metric::*;
        const MEMORY: &[Metric] =
            &[Resident(Role::Near), Resident(Role::Far), TcpMemory, Slab, Resident(Role::Client)];
        match workload {
            Workload::PingPong { .. } => &[P50, P90, P99, P999, CpuPerThousand, ProxyCpuPerThousand],
            Workload::FirstByte => &[P50, P90, P99],
            Workload::Connect { at_once: 1 } => {
                &[P50, P90, P99, P999, PerSecond, CpuPerThousand, ProxyCpuPerThousand]
            }
            Workload::Connect { .. } => {
                &[PerSecond, P50, P90, P99, P999, CpuPerThousand, ProxyCpuPerThousand]
            }
            Workload::Crowd { bulk: None, .. } => {
                &[P99, P50, P90, P999, PerSecond, CpuPerThousand, ProxyCpuPerThousand]
            }
            Workload::Crowd { .. } => &[P99, P50, P90, P999, PerSecond, Gbits],
            Workload::Rate { .. } => &[P50, P90, P99, P999, PerSecond, CpuPerThousand, ProxyCpuPerThousand],
            Workload::Bulk { .. } | Workload::Soak { .. } => &[Gbits, CpuPerGb, ProxyCpuPerGb],
            Workload::Idle { .. } => MEMORY,
        }
    }

    /// Its unit, as it stands behind a number.
    pub fn unit(self) -> &'static str {
        match self {
            Self::P50 | Self::P90 | Self::P99 | Self::P999 => "µs",
            Self::PerSecond => "/s",
            Self::Gbits => "Gbit/s",
            Self::CpuPerGb | Self::ProxyCpuPerGb => "s/GB",
            Self::CpuPerThousand | Self::ProxyCpuPerThousand => "s/1000",
            Self::Resident(_) | Self::TcpMemory | Self::Slab => "B",
        }
    }

    /// Which way is good.
    pub fn better(self) -> Better {
        match self {
            Self::PerSecond | Self::Gbits => Better::Higher,
            _ => Better::Lower,
        }
    }

    /// Its value in a run, if that has one.
    pub fn value(self, run: &Run) -> Option<f64> {
        const GB: f64 = 1e9;
        let latency = run.outcome.latency.as_ref();
        let micros = |nanos: u64| nanos as f64 / 1e3;
        let cpu = |roles: &[Role]| {
            let parts: Vec<f64> = roles.iter().filter_map(|role| run.cpu.get(role).copied()).collect();
            (!parts.is_empty()).then(|| parts.iter().sum::<f64>())
        };
        let bytes = (run.outcome.bytes_up + run.outcome.bytes_down) as f64;
        let thousands = run.outcome.operations as f64 / 1e3;
        let over = |top: Option<f64>, bottom: f64| top.filter(|_| bottom > 0.0).map(|top| top / bottom);
        const PROXIES: [Role; 2] = [Role::Near, Role::Far];
        let memory = run.memory.as_ref();
        let each = |of: Option<i64>| over(of.map(|b| b as f64), memory.map_or(0.0, |m| m.connections as f64));
        match self {
            Self::P50 => latency.map(|l| micros(l.p50)),
            Self::P90 => latency.map(|l| micros(l.p90)),
            Self::P99 => latency.map(|l| micros(l.p99)),
            Self::P999 => latency.map(|l| micros(l.p999)),
            Self::PerSecond => over(Some(run.outcome.operations as f64), run.outcome.seconds),
            Self::Gbits => over(Some(bytes * 8.0 / 1e9), run.outcome.seconds),
            Self::CpuPerGb => over(cpu(&Role::ALL), bytes / GB),
            Self::ProxyCpuPerGb => over(cpu(&PROXIES), bytes / GB),
            Self::CpuPerThousand => over(cpu(&Role::ALL), thousands),
            Self::ProxyCpuPerThousand => over(cpu(&PROXIES), thousands),
            Self::Resident(role) => each(memory.and_then(|m| m.resident.get(&role).copied())),
            Self::TcpMemory => each(memory.map(|m| m.tcp)),
            Self::Slab => each(memory.map(|m| m.slab)),
        }
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::P50 => f.write_str("p50"),
            Self::P90 => f.write_str("p90"),
            Self::P99 => f.write_str("p99"),
            Self::P999 => f.write_str("p99.9"),
            Self::PerSecond => f.write_str("rate"),
            Self::Gbits => f.write_str("throughput"),
            Self::CpuPerGb | Self::CpuPerThousand => f.write_str("CPU, all"),
            Self::ProxyCpuPerGb | Self::ProxyCpuPerThousand => f.write_str("CPU, proxies"),
            Self::Resident(role) => write!(f, "memory, {role}"),
            Self::TcpMemory => f.write_str("memory, TCP buffers"),
            Self::Slab => f.write_str("memory, kernel slabs"),
        }
    }
}

/// A handful of values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Half are no larger.
    pub median: f64,
    /// A quarter are no larger.
    pub q1: f64,
    /// Three quarters are no larger.
    pub q3: f64,
    /// How many.
    pub n: usize,
}

impl Summary {
    /// Of values in any order; nothing of none.
    pub fn new(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().filter(|v| v.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let at = |q: f64| quantile(&sorted, q);
        Some(Self { median: at(0.5)?, q1: at(0.25)?, q3: at(0.75)?, n: sorted.len() })
    }

    /// The distance between the quartiles: half of the values lie within.
    pub fn iqr(&self) -> f64 {
        self.q3 - self.q1
    }
}

/// Between two values it is interpolated (type 7 of Hyndman and Fan, the default of R and NumPy).
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an index that is not negative and less than the length"
)]
fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let at = q * last as f64;
    let (below, above) = (at.floor() as usize, at.ceil() as usize);
    let (low, high) = (sorted.get(below)?, sorted.get(above)?);
    Some(low + (high - low) * at.fract())
}

impl Scenario {
    /// A metric of a workload on an arm.
    pub fn summary(&self, arm: &str, task: &str, metric: Metric) -> Option<Summary> {
        Summary::new(self.runs(arm, task).iter().filter_map(|run| metric.value(run)))
    }

    /// The same as a ratio to the baseline, round by round.
    pub fn ratio(&self, arm: &str, task: &str, metric: Metric) -> Option<Summary> {
        let baseline = self.baseline().filter(|b| b.name != arm)?;
        self.ratio_to(&baseline.name, arm, task, metric)
    }

    /// The same as a ratio to any other arm, round by round.
    pub fn ratio_to(&self, base: &str, arm: &str, task: &str, metric: Metric) -> Option<Summary> {
        Summary::new(self.ratios(base, arm, task, metric))
    }

    /// The ratios themselves; rounds in which the other arm has nothing to divide by are left out.
    pub fn ratios(&self, base: &str, arm: &str, task: &str, metric: Metric) -> Vec<f64> {
        let pairs = self.pairs(base, arm, task, metric);
        pairs.into_iter().filter(|(under, _)| *under > 0.0).map(|(under, over)| over / under).collect()
    }

    /// A metric on two arms, the base's first, of the rounds in which both have it.
    pub fn pairs(&self, base: &str, arm: &str, task: &str, metric: Metric) -> Vec<(f64, f64)> {
        let base = self.runs(base, task);
        let pair = |run: &Run| {
            let same = base.iter().find(|b| b.round == run.round)?;
            Some((metric.value(same)?, metric.value(run)?))
        };
        self.runs(arm, task).iter().filter_map(pair).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_are_those_of_r_and_numpy() {
        let summary = Summary::new([7.0, 1.0, 3.0, 5.0, 9.0, 11.0, 13.0]).expect("seven values");
        assert_eq!((summary.q1, summary.median, summary.q3, summary.n), (4.0, 7.0, 10.0, 7));
        assert_eq!(Summary::new([2.0, 1.0]).map(|s| (s.q1, s.median)), Some((1.25, 1.5)));
        assert_eq!(Summary::new([f64::NAN]), None);
    }
}
