//! Pages of lists that the sources have in a macro: why flows end, and what is counted.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result, ensure};

/// A line of a list, and what the comment above it says.
struct Entry {
    meaning: String,
    line: String,
}

/// The lines of `list` in `text`: what is between the line that begins it and the one that closes it.
fn entries(text: &str, list: &str) -> Result<Vec<Entry>> {
    let (_, rest) = text.split_once(list).with_context(|| format!("there is no {list}"))?;
    let mut entries = Vec::new();
    let mut meaning = Vec::new();
    for line in rest.lines().map(str::trim).take_while(|line| !line.starts_with('}')) {
        match line.strip_prefix("///") {
            Some(comment) => meaning.push(comment.trim().replace("[`", "`").replace("`]", "`")),
            None if line.is_empty() || line.starts_with("#[") || meaning.is_empty() => {}
            None => {
                let meaning = std::mem::take(&mut meaning).join(" ").replace('|', "\\|");
                entries.push(Entry { meaning, line: line.to_owned() });
            }
        }
    }
    ensure!(!entries.is_empty(), "{list} is empty");
    Ok(entries)
}

/// Why flows end: the log's `reason`, the counters `ended_…`, and what a CONNECT request is answered.
pub(super) fn end_reasons(root: &Path) -> Result<String> {
    let text = fs::read_to_string(root.join("tunnel-user/src/model/end.rs"))?;
    let mut page = "# Why a flow ends\n\nOne list for the log (`reason=`), records (`--stats`, `--stats-json`), counters (`ended_` and \
                    the word) and the answer to a CONNECT request (status, and the error in `proxy-status`, RFC 9209). A word keeps \
                    its meaning: programs may match it.\n\n\
                    | reason | meaning | caused by | status | `proxy-status` |\n|---|---|---|---|---|\n"
        .to_owned();
    for Entry { meaning, line } in entries(&text, "\nreasons! {")? {
        let word = line.split('"').nth(1).with_context(|| format!("no reason: {line}"))?;
        let rest = line.rsplit(&format!("\"{word}\",")).next().unwrap_or_default();
        let cells: Vec<_> = rest.trim_end_matches(';').split(", ").map(str::trim).collect();
        ensure!(cells.len() == 3, "no reason: {line}");
        let fault = cells[0].to_ascii_lowercase();
        let inner = |cell: &str| {
            cell.strip_prefix("Some(")
                .and_then(|c| c.strip_suffix(')'))
                .unwrap_or_default()
                .trim_matches('"')
                .to_owned()
        };
        let status = inner(cells[1]).trim_start_matches("S::").replace('_', " ").to_ascii_lowercase();
        let error = inner(cells[2]);
        let error = if error.is_empty() { error } else { format!("`{error}`") };
        let _ = writeln!(page, "| `{word}` | {meaning} | {fault} | {status} | {error} |");
    }
    Ok(page)
}

/// Counters of workers and of the kernel programs.
pub(super) fn counters(root: &Path) -> Result<String> {
    let mut page = "# Counters\n\nA daemon logs them when it ends.\n\n## Of the workers\n\nBesides these there is one for each [reason why a \
                    flow ends](end-reasons.md).\n\n| counter | counts |\n|---|---|\n"
        .to_owned();
    let text = fs::read_to_string(root.join("tunnel-user/src/observe/stats.rs"))?;
    for Entry { meaning, line } in entries(&text, "\ncounters! {")? {
        let _ = writeln!(page, "| `{}` | {meaning} |", line.trim_end_matches(','));
    }
    page.push_str("\n## Of the process\n\n| counter | counts |\n|---|---|\n");
    let text = fs::read_to_string(root.join("tunnel-user/src/observe/totals.rs"))?;
    for Entry { meaning, line } in entries(&text, "\ntotals! {")? {
        let _ = writeln!(page, "| `{}` | {meaning} |", line.split(' ').next().unwrap_or_default());
    }
    page.push_str("\n## Of a capture's programs\n\n| counter | counts |\n|---|---|\n");
    let text = fs::read_to_string(root.join("tunnel-common/src/names.rs"))?;
    for Entry { meaning, line } in entries(&text, "\npub enum Counter {")? {
        let variant = line.split(' ').next().unwrap_or_default();
        let named =
            text.split(&format!("(Self::{variant}, \"")).nth(1).and_then(|rest| rest.split('"').next());
        let name = named.with_context(|| format!("the counter {variant} has no name"))?;
        let _ = writeln!(page, "| `{name}` | {meaning} |");
    }
    Ok(page)
}

/// What the admin interface measures.
pub(super) fn metrics(root: &Path) -> Result<String> {
    let mut page = "# Metrics\n\n`/metrics` of the [admin interface](../guide/observing.md), as OpenMetrics or as Prometheus text by `Accept`. \
                    Labels take words of this program and names of the configuration only: no peer can add a series. The values of \
                    `reason` are [the reasons why a flow ends](end-reasons.md), those of `event` [counters](counters.md).\n\n\
                    | metric | kind | labels | meaning |\n|---|---|---|---|\n"
        .to_owned();
    let text = fs::read_to_string(root.join("tunnel-user/src/admin/metrics/table.rs"))?;
    for Entry { meaning, line } in entries(&text, "\nmetrics! {")? {
        let name = line.split('"').nth(1).with_context(|| format!("no metric: {line}"))?;
        let (_, rest) = line.split_once("\", ").with_context(|| format!("no metric: {line}"))?;
        let (kind, labels) = rest.split_once(", ").with_context(|| format!("no metric: {line}"))?;
        let name = if kind == "Counter" { format!("{name}_total") } else { name.to_owned() };
        let labels = match labels.trim_start_matches('[').trim_end_matches("];") {
            // Of 23 labels some are always "unknown".
            "@istio" => "those of ztunnel's TCP metrics".to_owned(),
            labels => labels.replace('"', "`"),
        };
        let _ = writeln!(page, "| `{name}` | {} | {labels} | {meaning} |", kind.to_ascii_lowercase());
    }
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_lines_with_a_comment() {
        let text = "macro\nlist! {\n    /// One [`a`],\n    /// two.\n    one,\n\n    /// Three.\n    #[x]\n    three = 3,\n}\n/// No.\nno";
        let found: Vec<_> = entries(text, "\nlist! {")
            .unwrap()
            .into_iter()
            .map(|e| format!("{}={}", e.line, e.meaning))
            .collect();
        assert_eq!(found, ["one,=One `a`, two.", "three = 3,=Three."]);
        assert!(entries(text, "\nother! {").is_err());
    }
}
