//! Links, anchors and the table of contents.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Component, Path, PathBuf},
};

use anyhow::Result;
use pulldown_cmark::{Event, HeadingLevel, Options, Parser, Tag, TagEnd};

/// What a document says about others, and can be linked to by.
struct Page {
    links: Vec<(usize, String)>,
    anchors: BTreeSet<String>,
    titles: usize,
}

/// Every mistake, each `FILE:LINE: what`.
pub(super) fn mistakes(root: &Path) -> Result<Vec<String>> {
    let documents = super::documents(root)?;
    let pages: BTreeMap<&str, Page> =
        documents.iter().map(|(name, text)| (name.as_str(), Page::parse(text))).collect();
    let mut mistakes = Vec::new();
    let mut listed = BTreeSet::new();
    for (&name, page) in &pages {
        let of_book = name.starts_with("docs/");
        if of_book && name != SUMMARY && page.titles != 1 {
            mistakes
                .push(format!("{name}: {} headings of the first level: a page has one title", page.titles));
        }
        for (line, link) in &page.links {
            let mut wrong = |what: &str| mistakes.push(format!("{name}:{line}: {link}: {what}"));
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            let (file, anchor) = link.split_once('#').map_or((link.as_str(), None), |(f, a)| (f, Some(a)));
            let target = if file.is_empty() { name.to_owned() } else { resolve(name, file) };
            if of_book && !target.starts_with("docs/") {
                wrong("leads out of the book: name the file without a link");
            } else if !root.join(&target).exists() {
                wrong("there is no such file");
            } else if let Some(anchor) = anchor
                && !pages.get(target.as_str()).is_some_and(|page| page.anchors.contains(anchor))
            {
                wrong("there is no such heading");
            }
            if name == SUMMARY && !listed.insert(target) {
                mistakes.push(format!("{name}:{line}: {link}: listed twice"));
            }
        }
    }
    let unlisted = pages
        .keys()
        .filter(|name| name.starts_with("docs/") && **name != SUMMARY && !listed.contains(**name));
    mistakes.extend(unlisted.map(|name| format!("{name}: is not in {SUMMARY}")));
    Ok(mistakes)
}

const SUMMARY: &str = "docs/SUMMARY.md";

impl Page {
    fn parse(text: &str) -> Self {
        let mut page = Self { links: Vec::new(), anchors: BTreeSet::new(), titles: 0 };
        let mut heading: Option<String> = None;
        for (event, range) in Parser::new_ext(text, Options::ENABLE_TABLES).into_offset_iter() {
            match event {
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                    let line = text[..range.start].matches('\n').count() + 1;
                    page.links.push((line, dest_url.into_string()));
                }
                Event::Start(Tag::Heading { level, .. }) => {
                    page.titles += usize::from(level == HeadingLevel::H1);
                    heading = Some(String::new());
                }
                Event::End(TagEnd::Heading(_)) => {
                    let slug = slug(&heading.take().unwrap_or_default());
                    let same = |n: usize| if n == 0 { slug.clone() } else { format!("{slug}-{n}") };
                    // As mdBook and GitHub number headings of the same words.
                    if let Some(free) = (0..).map(same).find(|slug| !page.anchors.contains(slug)) {
                        page.anchors.insert(free);
                    }
                }
                Event::Text(text) | Event::Code(text) => {
                    if let Some(heading) = &mut heading {
                        heading.push_str(&text);
                    }
                }
                _ => {}
            }
        }
        page
    }
}

/// The anchor of a heading, as mdBook and GitHub make it.
fn slug(heading: &str) -> String {
    heading
        .trim()
        .chars()
        .filter_map(|c| match c {
            c if c.is_alphanumeric() || c == '_' || c == '-' => Some(c.to_ascii_lowercase()),
            c if c.is_whitespace() => Some('-'),
            _ => None,
        })
        .collect()
}

/// Where a link in `name` leads, from the checkout's root.
fn resolve(name: &str, link: &str) -> String {
    let mut path = PathBuf::new();
    let folder = Path::new(name).parent().unwrap_or_else(|| Path::new(""));
    for part in folder.join(link).components() {
        match part {
            Component::ParentDir => drop(path.pop()),
            Component::Normal(part) => path.push(part),
            _ => {}
        }
    }
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anchors_are_those_of_mdbook() {
        assert_eq!(slug("The [[capture]] table"), "the-capture-table");
        assert_eq!(slug("envoy/original-dst.yaml"), "envoyoriginal-dstyaml");
        let page = Page::parse("# A b\n\n## `x` y\n\n## x y\n\n[l](../z.md#q)\n");
        assert_eq!(page.anchors.into_iter().collect::<Vec<_>>(), ["a-b", "x-y", "x-y-1"]);
        assert_eq!((page.links, page.titles), (vec![(7, "../z.md#q".to_owned())], 1));
    }

    #[test]
    fn links_are_relative_to_their_document() {
        assert_eq!(resolve("docs/adr/0001.md", "../guide/x.md"), "docs/guide/x.md");
        assert_eq!(resolve("README.md", "docs/x.md"), "docs/x.md");
        assert_eq!(resolve("docs/x.md", "../../x.md"), "x.md");
    }
}
