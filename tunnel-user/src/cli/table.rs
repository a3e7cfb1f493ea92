//! Tables for people: columns as wide as their widest cell.

/// Cells in columns, two spaces apart.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    /// Columns whose cells stand on the right.
    right: &'static [usize],
}

impl Table {
    /// With a head; `right` are the columns of numbers.
    pub(crate) fn new(head: &[&str], right: &'static [usize]) -> Self {
        Self { rows: vec![head.iter().map(|cell| (*cell).to_owned()).collect()], right }
    }

    pub(crate) fn push(&mut self, row: impl IntoIterator<Item = String>) {
        self.rows.push(row.into_iter().collect());
    }

    /// Whether there is nothing but the head.
    pub(crate) fn is_empty(&self) -> bool {
        self.rows.len() < 2
    }

    /// The lines, each with its end. What is not to be printed on a terminal is escaped.
    pub(crate) fn text(&self) -> String {
        let rows: Vec<Vec<String>> =
            self.rows.iter().map(|row| row.iter().map(|c| printable(c)).collect()).collect();
        let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |i: usize| rows.iter().filter_map(|row| row.get(i)).map(|c| c.chars().count()).max();
        let widths: Vec<_> = (0..columns).map(|i| width(i).unwrap_or(0)).collect();
        let mut out = String::new();
        for row in &rows {
            let cells = row.iter().enumerate().map(|(i, cell)| {
                let width = widths[i];
                if self.right.contains(&i) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
            });
            out += cells.collect::<Vec<_>>().join("  ").trim_end();
            out.push('\n');
        }
        out
    }
}

/// A text that a terminal takes for text.
pub(crate) fn printable(text: &str) -> String {
    if text.chars().any(char::is_control) { text.escape_debug().to_string() } else { text.to_owned() }
}

/// Three digits and a unit, powers of 1024.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub(crate) fn bytes(n: u64) -> String {
    amount(n as f64)
}

/// The same of a rate.
pub(crate) fn amount(n: f64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (n, 0);
    while value >= 1000.0 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{value:.0} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_control_characters_are_escaped() {
        let mut table = Table::new(&["NAME", "N"], &[1]);
        table.push(["a\x1b[2J".to_owned(), "5".to_owned()]);
        table.push(["bc".to_owned(), "1234".to_owned()]);
        assert_eq!(table.text(), "NAME           N\na\\u{1b}[2J     5\nbc          1234\n");
    }

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!([0, 999, 1000, 1_048_576].map(bytes), ["0 B", "999 B", "1.0 KiB", "1.0 MiB"]);
    }
}
