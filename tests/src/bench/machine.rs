//! Where a benchmark ran, and when.

use std::{fs, thread};

use anyhow::{Context as _, Result};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{arms::Network, model::Machine};

/// What this machine is.
pub(super) fn describe() -> Result<Machine> {
    let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned());
    let value = |text: &str, key: &str, separator: char| {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        line.and_then(|line| line.trim_start().strip_prefix(separator))
            .map(|v| v.trim().trim_matches('"').to_owned())
    };
    let cpuinfo = read("/proc/cpuinfo")?;
    let model = value(&cpuinfo, "model name", ':').or_else(|| value(&cpuinfo, "CPU part", ':'));
    let memory = value(&read("/proc/meminfo")?, "MemTotal", ':').context("/proc/meminfo has no MemTotal")?;
    let kib: u64 = memory.trim_end_matches(" kB").parse().context("MemTotal in /proc/meminfo")?;
    let release = read("/etc/os-release").unwrap_or_default();
    Ok(Machine {
        cpu: model.unwrap_or_else(|| "unknown".to_owned()),
        cores: u32::try_from(thread::available_parallelism()?.get())?,
        memory: kib * 1024,
        kernel: read("/proc/sys/kernel/osrelease")?,
        system: value(&release, "PRETTY_NAME", '=').unwrap_or_else(|| "unknown".to_owned()),
        congestion_control: Network::CABLE.congestion.to_owned(),
    })
}

/// The time, as RFC 3339 writes it, in UTC.
pub(super) fn now() -> Result<String> {
    let now = OffsetDateTime::now_utc().replace_nanosecond(0)?;
    Ok(now.format(&Rfc3339)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_can_be_described() -> Result<()> {
        let machine = describe()?;
        assert!(machine.cores > 0 && machine.memory > 0 && machine.kernel.contains('.'), "{machine:?}");
        Ok(())
    }
}
