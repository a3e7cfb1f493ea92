//! `cargo xtask rooms`: which room of `tunnel-user` imports which, and whether any arrow runs back.
//!
//! The sources are parsed: `use` declarations, paths that begin with `crate::` or `super::` anywhere in the code, and what a
//! room re-exports from another one. Tests may import what they like.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use clap::Args as ClapArgs;
use syn::{
    Attribute, ItemMod, ItemUse, UseTree, Visibility,
    spanned::Spanned as _,
    visit::{self, Visit},
};

use crate::{
    run::{Checkout, green},
    unsafes,
};

/// The rooms, from the left to the right: each may import those behind it, and none of its own rank.
const ORDER: [&[&str]; 10] = [
    &["cli", "daemon"],
    &["admin", "worker"],
    &["proxy"],
    &["sources", "routing", "sinks"],
    &["relay"],
    &["identity"],
    &["transport"],
    &["observe", "kernel", "process"],
    &["config"],
    &["model"],
];

/// Arrows that run back and have not been removed yet. One that is gone is taken off this list; none is added.
const KNOWN: &[(&str, &str)] = &[];

/// Where files may say that they have `unsafe`; the compiler denies it to all others (`#![deny(unsafe_code)]`).
const UNSAFE: [&str; 2] = ["kernel", "transport/sockopt.rs"];

pub(crate) const EXAMPLES: &str = "\
Examples:
  cargo xtask rooms            # every arrow, with how often; fails on one that runs back
  cargo xtask rooms --why config:transport";

#[derive(ClapArgs, Default)]
pub(crate) struct Args {
    /// Lists the places of one arrow.
    #[arg(long, value_name = "FROM:TO")]
    why: Option<String>,
}

/// Where one room names another one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    file: PathBuf,
    line: usize,
    path: String,
}

type Arrows = BTreeMap<(String, String), BTreeSet<Place>>;

pub(crate) fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    let sources = checkout.root.join("tunnel-user/src");
    let house = House::read(&sources)?;
    let arrows = house.arrows();
    if let Some(why) = &args.why {
        let (from, to) = why.split_once(':').context("--why takes FROM:TO, such as config:transport")?;
        for place in arrows.get(&(from.to_owned(), to.to_owned())).into_iter().flatten() {
            println!("{}:{}: {}", place.file.display(), place.line, place.path);
        }
        return Ok(());
    }
    let mut wrong = house.inside();
    wrong.extend(house.unsafe_elsewhere.iter().map(|file| {
        format!(
            "{}: unsafe_code is expected here, and it belongs into {}",
            file.display(),
            UNSAFE.join(" and ")
        )
    }));
    wrong.extend(unsafes::check(&checkout.root)?);
    for ((from, to), places) in &arrows {
        let known = KNOWN.contains(&(from, to));
        let back = !may_import(from, to);
        println!("{from} -> {to}: {}{}", places.len(), if back { "  (runs back)" } else { "" });
        if back && !known {
            let at = places.iter().map(|p| format!("    {}:{}: {}", p.file.display(), p.line, p.path));
            wrong.push(format!("{from} may not import {to}:\n{}", at.collect::<Vec<_>>().join("\n")));
        }
        if !back && known {
            wrong.push(format!("{from} -> {to} is allowed, and is in the list of arrows that run back"));
        }
    }
    for (from, to) in KNOWN {
        if !arrows.contains_key(&((*from).to_owned(), (*to).to_owned())) {
            wrong.push(format!("{from} -> {to} is gone: take it off the list of arrows that run back"));
        }
    }
    for room in house.rooms() {
        if rank(&room).is_none() {
            wrong.push(format!("no room is called {room}: see ORDER in xtask/src/rooms.rs"));
        }
    }
    if !wrong.is_empty() {
        bail!("{}", wrong.join("\n"));
    }
    let back = KNOWN.len();
    println!(
        "{} {} rooms, {} arrows, {back} of them run back",
        green("ok "),
        house.rooms().len(),
        arrows.len()
    );
    Ok(())
}

fn rank(room: &str) -> Option<usize> {
    ORDER.iter().position(|rooms| rooms.contains(&room))
}

fn may_import(from: &str, to: &str) -> bool {
    rank(from).zip(rank(to)).is_some_and(|(from, to)| from < to)
}

/// What the sources say.
#[derive(Default)]
struct House {
    /// Every path that a file names, absolute, by the file's module.
    named: Vec<(Vec<String>, Vec<String>, Place)>,
    /// What a module re-exports: where it is found, and where it is from.
    reexports: Vec<(Vec<String>, Vec<String>)>,
    /// Modules that only their own room may enter.
    closed: BTreeSet<Vec<String>>,
    /// Files that say they have `unsafe`, and may not.
    unsafe_elsewhere: Vec<PathBuf>,
}

impl House {
    fn read(sources: &Path) -> Result<Self> {
        let mut house = Self::default();
        let files = self::sources(sources)?;
        let mut tests = BTreeSet::new();
        let mut parsed = Vec::new();
        for file in files {
            let relative = file.strip_prefix(sources)?.to_owned();
            let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
            let says = ["expect(unsafe_code", "allow(unsafe_code", "warn(unsafe_code"];
            if says.iter().any(|says| text.contains(says))
                && !UNSAFE.iter().any(|may| relative.starts_with(may))
            {
                house.unsafe_elsewhere.push(relative.clone());
            }
            let syntax = syn::parse_file(&text).with_context(|| format!("parsing {}", file.display()))?;
            parsed.push((module_of(&relative), relative, syntax));
        }
        for (module, _, syntax) in &parsed {
            for item in &syntax.items {
                let syn::Item::Mod(item) = item else { continue };
                let mut path = module.clone();
                path.push(item.ident.to_string());
                if is_test(&item.attrs) {
                    tests.insert(path);
                } else if !matches!(item.vis, Visibility::Public(_)) {
                    house.closed.insert(path);
                }
            }
        }
        for (module, file, syntax) in &parsed {
            // The program and the root of the library see all rooms.
            if module.is_empty() || (0..=module.len()).any(|n| tests.contains(&module[..n])) {
                continue;
            }
            let mut reader = Reader { house: &mut house, module: module.clone(), file };
            reader.visit_file(syntax);
        }
        Ok(house)
    }

    fn rooms(&self) -> BTreeSet<String> {
        self.named.iter().filter_map(|(from, ..)| from.first().cloned()).collect()
    }

    /// Follows what a path names to the room that it is from.
    fn origins(&self, path: &[String]) -> BTreeSet<String> {
        let mut rooms: BTreeSet<String> = path.first().cloned().into_iter().collect();
        let mut seen = vec![path.to_vec()];
        let mut next = seen.clone();
        while let Some(path) = next.pop() {
            for (found, from) in &self.reexports {
                let all = found.last().is_some_and(|last| last == "*");
                let prefix = if all { &found[..found.len() - 1] } else { &found[..] };
                if path.starts_with(prefix) && !(all && path.len() == prefix.len()) {
                    let base = if all { &from[..from.len() - 1] } else { &from[..] };
                    let origin = [base, &path[prefix.len()..]].concat();
                    // One that leads back into itself ends here.
                    if origin.len() <= path.len() && !seen.contains(&origin) {
                        rooms.extend(origin.first().cloned());
                        seen.push(origin.clone());
                        next.push(origin);
                    }
                }
            }
        }
        rooms
    }

    fn arrows(&self) -> Arrows {
        let mut arrows = Arrows::new();
        for (module, path, place) in &self.named {
            let Some(from) = module.first() else { continue };
            for to in self.origins(path) {
                if to != *from && rank(&to).is_some() {
                    arrows.entry((from.clone(), to)).or_default().insert(place.clone());
                }
            }
        }
        arrows
    }

    /// Paths into modules of another room that are not public.
    fn inside(&self) -> Vec<String> {
        self.named
            .iter()
            .filter(|(module, path, _)| {
                module.first() != path.first() && (2..=path.len()).any(|n| self.closed.contains(&path[..n]))
            })
            .map(|(_, _, p)| format!("{}:{}: {} is another room's inside", p.file.display(), p.line, p.path))
            .collect()
    }
}

/// Reads one file.
struct Reader<'a> {
    house: &'a mut House,
    module: Vec<String>,
    file: &'a Path,
}

impl Reader<'_> {
    /// The absolute path, of one that begins with `crate`, `self` or `super`.
    fn absolute(&self, path: &[String]) -> Option<Vec<String>> {
        let mut module = self.module.clone();
        let rest = match path.first()?.as_str() {
            "crate" => return Some(path[1..].to_vec()),
            "self" => &path[1..],
            "super" => {
                let supers = path.iter().take_while(|s| *s == "super").count();
                module.truncate(module.len().checked_sub(supers)?);
                &path[supers..]
            }
            _ => return None,
        };
        Some([&module[..], rest].concat())
    }

    fn name(&mut self, path: &[String], line: usize) -> Option<Vec<String>> {
        let absolute = self.absolute(path)?;
        let place = Place { file: self.file.to_owned(), line, path: absolute.join("::") };
        self.house.named.push((self.module.clone(), absolute.clone(), place));
        Some(absolute)
    }
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        if is_test(&item.attrs) {
            return;
        }
        self.module.push(item.ident.to_string());
        visit::visit_item_mod(self, item);
        self.module.pop();
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        if !is_test(&item.attrs) {
            visit::visit_item_fn(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        if is_test(&item.attrs) {
            return;
        }
        let mut leaves = Vec::new();
        flatten(&item.tree, &mut Vec::new(), &mut leaves);
        let line = item.span().start().line;
        for (path, name) in leaves {
            // In this edition a path without a keyword may begin with a module of this one.
            let local = |p: &[String]| {
                self.absolute(p).or_else(|| {
                    let mut found = self.module.clone();
                    found.extend_from_slice(p);
                    Some(found)
                })
            };
            if !matches!(item.vis, Visibility::Inherited) {
                let from = local(&path).unwrap_or_default();
                let found = [&self.module[..], &[name]].concat();
                self.house.reexports.push((found, from));
            }
            self.name(&path, line);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<String> = path.segments.iter().map(|s| s.ident.to_string()).collect();
        if path.leading_colon.is_none() && segments.len() > 1 {
            self.name(&segments, path.span().start().line);
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, found: &'ast syn::Macro) {
        // What a macro is given is read as tokens: `crate :: a :: b`.
        let text = found.tokens.to_string().replace(' ', "");
        for (at, _) in text.match_indices("crate::") {
            let path: String =
                text[at..].chars().take_while(|c| c.is_alphanumeric() || matches!(c, '_' | ':')).collect();
            let segments: Vec<String> = path.split("::").map(str::to_owned).collect();
            self.name(&segments, found.span().start().line);
        }
        visit::visit_macro(self, found);
    }
}

/// The paths of a `use`, each with the name that it has afterwards.
fn flatten(tree: &UseTree, prefix: &mut Vec<String>, leaves: &mut Vec<(Vec<String>, String)>) {
    match tree {
        UseTree::Path(path) => {
            prefix.push(path.ident.to_string());
            flatten(&path.tree, prefix, leaves);
            prefix.pop();
        }
        UseTree::Name(name) if name.ident == "self" => {
            leaves.push((prefix.clone(), prefix.last().cloned().unwrap_or_default()));
        }
        UseTree::Name(name) => {
            let name = name.ident.to_string();
            leaves.push(([&prefix[..], std::slice::from_ref(&name)].concat(), name));
        }
        UseTree::Rename(renamed) => {
            let path = [&prefix[..], &[renamed.ident.to_string()]].concat();
            leaves.push((path, renamed.rename.to_string()));
        }
        UseTree::Glob(_) => leaves.push(([&prefix[..], &["*".to_owned()]].concat(), "*".to_owned())),
        UseTree::Group(group) => group.items.iter().for_each(|tree| flatten(tree, prefix, leaves)),
    }
}

/// Whether an item is there for tests only.
fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|a| {
        a.path().is_ident("test")
            || (a.path().is_ident("cfg") && a.parse_args::<syn::Ident>().is_ok_and(|cfg| cfg == "test"))
    })
}

/// The module of a file: `a/b/mod.rs` and `a/b.rs` are `a::b`.
fn module_of(file: &Path) -> Vec<String> {
    let mut module: Vec<String> =
        file.with_extension("").iter().map(|part| part.to_string_lossy().into_owned()).collect();
    if module.last().is_some_and(|last| ["mod", "lib", "main"].contains(&last.as_str())) {
        module.pop();
    }
    module
}

/// Every source file below a folder, in order.
pub(crate) fn sources(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    collect(folder, &mut files)?;
    files.sort();
    Ok(files)
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A house of these files.
    fn house(files: &[(&str, &str)]) -> Result<House> {
        let folder =
            std::env::temp_dir().join(format!("tunnel-rooms-{}-{}", std::process::id(), files.len()));
        for (name, text) in files {
            let file = folder.join(name);
            fs::create_dir_all(file.parent().context("a folder")?)?;
            fs::write(file, text)?;
        }
        let house = House::read(&folder);
        fs::remove_dir_all(folder)?;
        house
    }

    fn back(house: &House) -> Vec<(String, String)> {
        house.arrows().into_keys().filter(|(from, to)| !may_import(from, to)).collect()
    }

    #[test]
    fn unsafe_code_is_found_outside_of_its_rooms() -> Result<()> {
        let says = "#![expect(unsafe_code, reason = \"x\")]";
        let files =
            [("kernel/a.rs", says), ("transport/sockopt.rs", says), ("transport/b.rs", says), ("c.rs", "")];
        assert_eq!(house(&files)?.unsafe_elsewhere, [PathBuf::from("transport/b.rs")]);
        Ok(())
    }

    #[test]
    fn an_arrow_that_runs_back_is_found_however_it_is_written() -> Result<()> {
        let ways = [
            "use crate::worker::Worker;",
            "use crate::{model::{A, B}, worker::{self, other as another}};",
            "fn f() -> crate::worker::Worker { todo!() }",
            "fn f() { println!(\"{}\", crate::worker::N) }",
            "mod inner { use super::super::super::worker::Worker; }",
        ];
        for (i, way) in ways.iter().enumerate() {
            let pad: Vec<(String, &str)> = (0..i).map(|n| (format!("model/pad{n}.rs"), "")).collect();
            let mut files = vec![("relay/copy.rs", *way), ("worker/mod.rs", "")];
            files.extend(pad.iter().map(|(name, text)| (name.as_str(), *text)));
            let arrows = back(&house(&files)?);
            assert_eq!(arrows, [("relay".to_owned(), "worker".to_owned())], "{way}");
        }
        Ok(())
    }

    #[test]
    fn what_is_re_exported_counts_for_where_it_is_from() -> Result<()> {
        let files = [
            ("transport/mod.rs", "pub use crate::relay::Leg as Way;"),
            ("identity/mod.rs", "use crate::transport::Way;"),
            ("relay/mod.rs", ""),
            ("relay/a.rs", ""),
            ("relay/b.rs", ""),
            ("relay/c.rs", ""),
        ];
        let found = back(&house(&files)?);
        let arrow = |from: &str, to: &str| (from.to_owned(), to.to_owned());
        assert_eq!(found, [arrow("identity", "relay"), arrow("transport", "relay")]);
        Ok(())
    }

    #[test]
    fn tests_may_import_what_they_like_and_a_rooms_inside_is_its_own() -> Result<()> {
        let files = [
            ("model/mod.rs", "#[cfg(test)] mod tests { use crate::worker::Worker; }\npub(crate) mod inside;"),
            ("model/inside.rs", ""),
            ("worker/mod.rs", "use crate::model::inside::Thing;"),
            ("relay/d.rs", ""),
            ("relay/e.rs", ""),
            ("relay/f.rs", ""),
            ("relay/g.rs", ""),
        ];
        let house = house(&files)?;
        assert!(back(&house).is_empty());
        assert_eq!(house.inside().len(), 1);
        Ok(())
    }
}
