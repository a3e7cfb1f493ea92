//! A scenario on the page: arms, pictures, tables.

use std::fmt::{self, Write as _};

use crate::bench::{
    model::{Arm, Scenario, State, Task},
    report::{
        number::{self, heading},
        plots::Plot,
        words::{absence, metrics, plain, rounds},
    },
    stats::{Metric, Summary},
};

use super::{anchor, escape};

pub(super) fn write(out: &mut String, scenario: &Scenario, plots: &[&Plot]) -> fmt::Result {
    write!(
        out,
        "<section id=\"{}\">\n<h2>{}</h2>\n<p>{}</p>\n",
        anchor(&scenario.name),
        escape(&scenario.title),
        escape(&scenario.about)
    )?;
    absences(out, scenario)?;
    arms(out, scenario)?;
    for plot in plots {
        // The picture has its title within.
        write!(out, "<figure>\n{}<figcaption>{}</figcaption>\n</figure>\n", plot.svg, escape(&plot.caption))?;
    }
    for task in &scenario.workloads {
        table(out, scenario, task)?;
    }
    out.push_str("</section>\n");
    Ok(())
}

fn absences(out: &mut String, scenario: &Scenario) -> fmt::Result {
    for arm in &scenario.arms {
        let Some(why) = absence(arm) else { continue };
        let class = if matches!(arm.state, State::Failed(_)) { " class=\"bad\"" } else { "" };
        writeln!(out, "<p{class}><b>{}</b>: {}</p>", escape(&plain(&arm.name)), escape(&why))?;
    }
    Ok(())
}

/// What was started, and what TLS agreed on.
fn arms(out: &mut String, scenario: &Scenario) -> fmt::Result {
    out.push_str("<details>\n<summary>Arms: what was started, and what TLS agreed on</summary>\n");
    for arm in &scenario.arms {
        let (name, title) = (plain(&arm.name), plain(&arm.title));
        let headline = if name == title { name } else { format!("{name}: {title}") };
        writeln!(out, "<h3>{}</h3>", escape(&headline))?;
        if let Some(tls) = &arm.tls {
            let all = format!("{}, {}, {}", tls.version, tls.cipher, tls.group);
            writeln!(out, "<p>Between the proxies: {}</p>", escape(&all))?;
        }
        if let Some(why) = absence(arm) {
            writeln!(out, "<p>{}</p>", escape(&why))?;
        } else if arm.processes.is_empty() {
            out.push_str(
                "<p class=\"soft\">Nothing was started between the application and its server.</p>\n",
            );
        }
        for program in &arm.processes {
            write!(
                out,
                "<div class=\"soft\">{}</div>\n<pre>{}</pre>\n",
                escape(&program.role.to_string()),
                escape(&program.command)
            )?;
            if let Some(text) = &program.configuration {
                writeln!(
                    out,
                    "<details><summary>its configuration</summary><pre>{}</pre></details>",
                    escape(text)
                )?;
            }
        }
    }
    out.push_str("</details>\n");
    Ok(())
}

fn table(out: &mut String, scenario: &Scenario, task: &Task) -> fmt::Result {
    let metrics = metrics(scenario, task);
    let most = rounds(scenario, task);
    write!(
        out,
        "<h3>{}</h3>\n<div class=\"wide\">\n<table>\n<caption><code>{}</code>, n = {most}; median ± \
         interquartile range, ratio to {}</caption>\n<thead><tr><th scope=\"col\">Arm</th>",
        escape(&task.title),
        escape(&task.name),
        escape(&scenario.baseline().map_or(String::new(), |arm| plain(&arm.name)))
    )?;
    for metric in &metrics {
        write!(out, "<th scope=\"col\" colspan=\"2\">{}</th>", escape(&heading(*metric)))?;
    }
    out.push_str("<th scope=\"col\">n</th></tr></thead>\n<tbody>\n");
    for arm in &scenario.arms {
        row(out, scenario, task, arm, &metrics)?;
    }
    out.push_str("</tbody>\n</table>\n</div>\n");
    Ok(())
}

fn row(out: &mut String, scenario: &Scenario, task: &Task, arm: &Arm, metrics: &[Metric]) -> fmt::Result {
    write!(out, "<tr><th scope=\"row\">{}</th>", escape(&plain(&arm.name)))?;
    let summaries: Vec<Option<Summary>> =
        metrics.iter().map(|metric| scenario.summary(&arm.name, &task.name, *metric)).collect();
    if summaries.iter().all(Option::is_none) {
        let class = if matches!(arm.state, State::Failed(_)) { "why bad" } else { "why soft" };
        let why = absence(arm).unwrap_or_else(|| "not run".to_owned());
        let columns = 2 * metrics.len() + 1;
        return writeln!(out, "<td class=\"{class}\" colspan=\"{columns}\">{}</td></tr>", escape(&why));
    }
    for (metric, summary) in metrics.iter().zip(summaries) {
        let Some(summary) = summary else {
            write!(out, "<td>{}</td><td></td>", number::NONE)?;
            continue;
        };
        let ratio = scenario.ratio(&arm.name, &task.name, *metric);
        write!(
            out,
            "<td>{} <span class=\"iqr\">± {}</span></td><td>{}</td>",
            number::of(*metric, summary.median),
            number::spread(*metric, summary.iqr()),
            ratio.map_or(String::new(), |ratio| number::ratio(ratio.median))
        )?;
    }
    writeln!(out, "<td>{}</td></tr>", scenario.runs(&arm.name, &task.name).len())
}
