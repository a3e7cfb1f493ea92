//! The blocks of a page that are run, or that files are made of.
//!
//! ```text
//! sh                     run on the node, and has to end with 0
//! sh gateway             run on the gateway's host
//! sh daemon              goes on until the page ends; it is waited for until it says READY=1 (sd_notify(3))
//! sh in=UNIT             run in the cgroup of that unit
//! sh fails               has to fail
//! toml agent.toml        a file of that name, in the folder that commands are run in
//! ```

use anyhow::{Result, bail};
use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

/// Where a block is run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Host {
    #[default]
    Node,
    Gateway,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File(String),
    Run(Run),
}

/// How a block is run.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) host: Host,
    /// Until the page ends.
    pub(super) stays: bool,
    /// In the cgroup of this unit.
    pub(super) group: Option<String>,
    pub(super) fails: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) line: usize,
    pub(super) kind: Kind,
    pub(super) text: String,
}

/// Languages of files.
const FILES: [&str; 4] = ["toml", "yaml", "ini", "json"];

pub(super) fn of(page: &str) -> Result<Vec<Block>> {
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for (event, range) in Parser::new_ext(page, Options::ENABLE_TABLES).into_offset_iter() {
        match event {
            Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(info))) => {
                let line = page[..range.start].matches('\n').count() + 1;
                open = kind(&info)?.map(|kind| Block { line, kind, text: String::new() });
            }
            Event::Text(text) => {
                if let Some(block) = &mut open {
                    block.text.push_str(&text);
                }
            }
            Event::End(TagEnd::CodeBlock) => blocks.extend(open.take()),
            _ => {}
        }
    }
    Ok(blocks)
}

fn kind(info: &str) -> Result<Option<Kind>> {
    let mut words = info.split_whitespace();
    let language = words.next().unwrap_or_default();
    if FILES.contains(&language) {
        return Ok(words.next().map(|name| Kind::File(name.to_owned())));
    }
    if language != "sh" {
        return Ok(None);
    }
    let mut run = Run::default();
    for word in words {
        match (word, word.strip_prefix("in=")) {
            ("gateway", _) => run.host = Host::Gateway,
            ("daemon", _) => run.stays = true,
            ("fails", _) => run.fails = true,
            (_, Some(unit)) => run.group = Some(unit.to_owned()),
            _ => bail!("a block says {info:?}, of which {word:?} is unknown"),
        }
    }
    Ok(Some(Kind::Run(run)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blocks_words_say_where_and_how_it_is_run() {
        let page = "# T\n\n```toml a.toml\nx = 1\n```\n\n```toml\nfragment = 1\n```\n\n```sh gateway daemon\ntunnel run\n```\n\n```text\nno\n```\n";
        let blocks = of(page).unwrap();
        let run = Kind::Run(Run { host: Host::Gateway, stays: true, ..Run::default() });
        assert_eq!(blocks.len(), 2);
        assert_eq!((&blocks[0].kind, &*blocks[0].text), (&Kind::File("a.toml".to_owned()), "x = 1\n"));
        assert_eq!((blocks[1].line, &blocks[1].kind), (11, &run));
        assert!(of("```sh gatewya\n```\n").is_err());
    }
}
