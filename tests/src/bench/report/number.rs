//! Numbers as people read them: three significant digits, which is what a median of a handful of runs supports. What is not
//! finite is a dash.

use crate::bench::stats::Metric;

/// What stands where there is no number.
pub(super) const NONE: &str = "–";

/// `0.0123`, `12.3`, `12,300`, `1.23 M`.
pub(super) fn number(value: f64) -> String {
    significant(value, 3)
}

fn significant(value: f64, digits: usize) -> String {
    if !value.is_finite() {
        return NONE.to_owned();
    }
    // Rust rounds here, and carries: 9,999 becomes 1.00e4.
    let rounded = format!("{:.*e}", digits - 1, value.abs());
    let (mantissa, exponent) = rounded.split_once('e').unwrap_or((&rounded, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let leading: f64 = mantissa.parse().unwrap_or(0.0);
    let sign = if value < 0.0 && leading > 0.0 { "−" } else { "" };
    let scaled = |power: i32| {
        let decimals = (digits - 1).saturating_add_signed(isize::try_from(-power).unwrap_or(0));
        format!("{:.decimals$}", leading * 10f64.powi(power))
    };
    match exponent {
        _ if leading == 0.0 => "0".to_owned(),
        -4..3 => format!("{sign}{}", scaled(exponent)),
        3..6 => format!("{sign}{}", grouped(&scaled(exponent))),
        6..9 => format!("{sign}{} M", scaled(exponent - 6)),
        9..12 => format!("{sign}{} G", scaled(exponent - 9)),
        _ => format!("{sign}{rounded}"),
    }
}

/// Thousands apart: `12,300`.
pub(super) fn grouped(digits: &str) -> String {
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `0 B`, `1.50 KiB`, `12.3 MiB`.
pub(super) fn bytes(value: f64) -> String {
    significant_bytes(value, 3)
}

fn significant_bytes(value: f64, digits: usize) -> String {
    const UNITS: [&str; 4] = ["B", "KiB", "MiB", "GiB"];
    let mut scaled = value;
    let mut units = UNITS.iter();
    let mut unit = units.next();
    // 1,023.6 B is 1.00 KiB and not 1,020 B.
    while scaled.abs() >= 1023.5
        && let Some(larger) = units.next()
    {
        scaled /= 1024.0;
        unit = Some(larger);
    }
    match unit {
        Some(&"B") if scaled.is_finite() => format!("{} B", significant(scaled.round(), digits)),
        Some(unit) if scaled.is_finite() => format!("{} {unit}", significant(scaled, digits)),
        _ => NONE.to_owned(),
    }
}

/// A value of a metric: with its unit when that depends on the value, otherwise without.
pub(super) fn of(metric: Metric, value: f64) -> String {
    if in_bytes(metric) { bytes(value) } else { number(value) }
}

/// How far values of a metric are apart: two digits, as nobody knows a quartile better than that.
pub(super) fn spread(metric: Metric, value: f64) -> String {
    if in_bytes(metric) { significant_bytes(value, 2) } else { significant(value, 2) }
}

/// Whether [`of`] writes the unit.
pub(super) fn in_bytes(metric: Metric) -> bool {
    metric.unit() == "B"
}

/// A metric's name with its unit, where values do not have it.
pub(super) fn heading(metric: Metric) -> String {
    if in_bytes(metric) { metric.to_string() } else { format!("{metric}, {}", metric.unit()) }
}

/// `1.23×`.
pub(super) fn ratio(value: f64) -> String {
    format!("{}×", number(value))
}

/// `+12.3 %`.
pub(super) fn percent(share: f64) -> String {
    let plus = if share > 0.0 { "+" } else { "" };
    let text = number(share * 100.0);
    if text == NONE { text } else { format!("{plus}{text} %") }
}

/// A tick of an axis: as short as it can be without being another number.
pub(super) fn tick(value: f64) -> String {
    let text = number(value);
    let (digits, suffix) = text.split_once(' ').map_or((text.as_str(), ""), |(digits, rest)| (digits, rest));
    let digits = if digits.contains('.') && !digits.contains('e') {
        digits.trim_end_matches('0').trim_end_matches('.')
    } else {
        digits
    };
    format!("{digits}{}{suffix}", if suffix.is_empty() { "" } else { " " })
}

/// `42 s`, `12 min`, `3 h 20 min`.
pub(super) fn duration(seconds: f64) -> String {
    const DAY: f64 = 86_400.0;
    match seconds {
        s if !s.is_finite() || s < 0.0 => NONE.to_owned(),
        s if s < 59.5 => format!("{s:.0} s"),
        s if s < 3570.0 => format!("{:.0} min", s / 60.0),
        s if s < DAY * 10.0 => {
            let minutes = (s / 60.0).round();
            format!("{:.0} h {:02.0} min", (minutes / 60.0).floor(), minutes % 60.0)
        }
        s => format!("{:.0} days", s / DAY),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_has_three_digits_and_no_more() {
        for (value, text) in [
            (0.0, "0"),
            (-0.0, "0"),
            (0.012345, "0.0123"),
            (0.00001234, "1.23e-5"),
            (0.9996, "1.00"),
            (1.0, "1.00"),
            (9.996, "10.0"),
            (123.4, "123"),
            (-12.34, "−12.3"),
            (999.6, "1,000"),
            (12_345.0, "12,300"),
            (999_900.0, "1.00 M"),
            (1_234_567.0, "1.23 M"),
            (45_600_000_000.0, "45.6 G"),
            (f64::NAN, NONE),
            (f64::INFINITY, NONE),
        ] {
            assert_eq!(number(value), text, "{value}");
        }
    }

    #[test]
    fn bytes_ticks_percents_and_durations_read_well() {
        let spreads = [0.0, 0.00183, 1.5, 938.0, 1090.0].map(|v| spread(Metric::P50, v));
        assert_eq!(spreads, ["0", "0.0018", "1.5", "940", "1,100"]);
        let all = [0.0, 999.0, 1023.9, 1536.0, 12.3 * 1_048_576.0, -2048.0].map(bytes);
        assert_eq!(all, ["0 B", "999 B", "1.00 KiB", "1.50 KiB", "12.3 MiB", "−2.00 KiB"]);
        assert_eq!([0.5, 20.0, 2000.0, 1.25, 5e6].map(tick), ["0.5", "20", "2,000", "1.25", "5 M"]);
        assert_eq!([0.1234, -0.02, 0.0].map(percent), ["+12.3 %", "−2.00 %", "0 %"]);
        assert_eq!([42.0, 720.0, 12_000.0].map(duration), ["42 s", "12 min", "3 h 20 min"]);
    }
}
