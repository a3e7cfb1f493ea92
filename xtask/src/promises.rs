//! `cargo xtask promises`: what is promised, and the test that keeps it.
//!
//! The sources are parsed: the first paragraph of a test's docs is its promise, and a line `Failure: NAME.` says which of
//! [`FAILURES`] it is about. An end-to-end test without docs is an error, and so is a failure without an end-to-end test.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use clap::Args as ClapArgs;
use proc_macro2::{Delimiter, TokenStream, TokenTree};
use syn::{Attribute, ItemFn, Macro, visit::Visit};

use crate::run::{Checkout, bold, dim, green};

/// Where end-to-end tests are.
const END_TO_END: &str = "tests/tests";
/// The threat model, which names the test of each of its promises.
const SECURITY: &str = "SECURITY.md";
/// Where the others are.
const OTHERS: [&str; 5] =
    ["tests/src", "tunnel-common/src", "tunnel-user/src", "tunnel-user/tests", "xtask/src"];

/// What can go wrong, by the name that tests use.
const FAILURES: [Failure; 12] = [
    Failure::new(
        "target-fails",
        "the target refuses, is unreachable, times out, or does not resolve",
        "502, 503 or 504 with a reason; the application's connection is reset, never a clean EOF",
    ),
    Failure::new(
        "refused",
        "a policy, a route or a capture refuses the flow",
        "403 at the gateway, reset at the application; what the configuration alone denies fails in connect()",
    ),
    Failure::new(
        "policy-changes",
        "a policy changes so that a live flow would be refused",
        "the flow is ended within a second, with that reason",
    ),
    Failure::new(
        "peer-certificate",
        "a peer's certificate is missing, expired, rotated, of another CA, or has another name",
        "no byte passes, and the error names the check",
    ),
    Failure::new(
        "endpoint-down",
        "an endpoint of an upstream is down, silent, or has no streams left",
        "the next endpoint is used; the failed one is ejected and probed; without any, flows fail at once",
    ),
    Failure::new(
        "connection-lost",
        "GOAWAY, stream limit, or a lost connection",
        "new streams elsewhere; old ones finish; flows on a lost connection are reset",
    ),
    Failure::new(
        "misbehaviour",
        "one application resets, floods, or does not read",
        "memory is bounded, and other flows on the same tunnel connection are not affected",
    ),
    Failure::new(
        "daemon-killed",
        "the daemon, an application or a target is killed",
        "flows are reset; `on_failure` decides; the next daemon adopts pinned maps and links",
    ),
    Failure::new(
        "daemon-upgraded",
        "a new daemon takes over",
        "the new one takes the listeners, the old one drains; no connection is refused",
    ),
    Failure::new(
        "fails-half-way",
        "a start, a reload or an attach fails half-way",
        "everything is as it was before",
    ),
    Failure::new(
        "limits",
        "a table is full, or a limit of descriptors, memory, ports or flows is reached",
        "the new connection is refused and counted; established flows continue",
    ),
    Failure::new(
        "hostile-peers",
        "a peer is slow, huge, malformed or hostile",
        "its connection is closed, and others are not affected",
    ),
];

/// Failures that no end-to-end test is about yet. One that has a test is taken off this list; none is added.
const WITHOUT_TEST: [&str; 0] = [];

/// The macro that makes a test for each way to carry a flow (`tests/src/modes.rs`).
const EACH_MODE: &str = "each_mode";

pub(crate) const EXAMPLES: &str = "\
Examples:
  cargo xtask promises               # every promise with its test; fails where an end-to-end test states none
  cargo xtask promises --failures    # what happens when something fails, and the tests of it
  cargo xtask promises half-close    # promises, tests and files that contain these words";

#[derive(ClapArgs, Default)]
pub(crate) struct Args {
    /// Only what contains these words.
    words: Vec<String>,
    /// By what goes wrong.
    #[arg(long)]
    failures: bool,
    /// Checks, and prints nothing but mistakes.
    #[arg(long)]
    check: bool,
}

impl Args {
    /// What CI runs.
    pub(crate) fn check() -> Self {
        Self { check: true, ..Self::default() }
    }
}

struct Failure {
    name: &'static str,
    event: &'static str,
    outcome: &'static str,
}

impl Failure {
    const fn new(name: &'static str, event: &'static str, outcome: &'static str) -> Self {
        Self { name, event, outcome }
    }
}

pub(crate) fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    let end_to_end = read(&checkout.root, END_TO_END)?;
    let mut all = end_to_end.clone();
    for folder in OTHERS {
        all.extend(read(&checkout.root, folder)?);
    }
    let mut mistakes = mistakes(&end_to_end, &all);
    let security = fs::read_to_string(checkout.root.join(SECURITY)).context(SECURITY)?;
    mistakes.extend(unknown(&security, &end_to_end));
    let wanted: Vec<&Test> = all.iter().filter(|test| test.has(&args.words)).collect();
    match args {
        Args { check: true, .. } => {}
        Args { failures: true, .. } => print_failures(&wanted),
        _ => print_promises(&wanted),
    }
    if !mistakes.is_empty() {
        bail!("{}", mistakes.join("\n"));
    }
    let (failures, stated) = (FAILURES.len(), all.iter().filter(|test| test.promise.is_some()).count());
    println!(
        "{} {} tests, {} of them end to end; {stated} state their promise; {failures} failures",
        green("ok "),
        all.len(),
        end_to_end.len(),
    );
    Ok(())
}

fn print_promises(tests: &[&Test]) {
    let mut file = Path::new("");
    for test in tests {
        if test.file != file {
            file = &test.file;
            println!("\n{}", bold(&file.display().to_string()));
        }
        println!("{}\n    {}", test.words(), dim(&test.name));
    }
    println!();
}

fn print_failures(tests: &[&Test]) {
    for failure in &FAILURES {
        println!("{}\n  {}: {}", bold(failure.name), failure.event, failure.outcome);
        for test in tests.iter().filter(|test| test.failures.iter().any(|name| name == failure.name)) {
            println!("    {}\n        {}", test.words(), dim(&test.place()));
        }
        println!();
    }
}

/// Tests that the threat model names, as `FILE::TEST`, and that are not there.
fn unknown(security: &str, end_to_end: &[Test]) -> Vec<String> {
    let is_there = |file: &str, name: &str| {
        end_to_end
            .iter()
            .any(|test| test.name == name && test.file.file_stem().is_some_and(|stem| stem == file))
    };
    // Every second part is between backticks.
    let named = security.split('`').skip(1).step_by(2).filter_map(|text| text.split_once("::"));
    named
        .filter(|(file, name)| *file != "file" && !is_there(file, name))
        .map(|(file, name)| format!("{SECURITY}: {file}::{name}: there is no such end-to-end test"))
        .collect()
}

fn mistakes(end_to_end: &[Test], all: &[Test]) -> Vec<String> {
    let mut found = Vec::new();
    for test in end_to_end.iter().filter(|test| test.promise.is_none()) {
        found.push(format!("{}: the first line of its docs has to state its promise", test.place()));
    }
    for test in all {
        for name in test.failures.iter().filter(|name| !FAILURES.iter().any(|f| f.name == **name)) {
            found.push(format!(
                "{}: no failure is named {name}: see FAILURES in xtask/src/promises.rs",
                test.place()
            ));
        }
    }
    for Failure { name, event, .. } in &FAILURES {
        let has_test = end_to_end.iter().any(|test| test.failures.iter().any(|failure| failure == name));
        match (has_test, WITHOUT_TEST.contains(name)) {
            (false, false) => {
                found.push(format!("{name} ({event}): no end-to-end test has the line `Failure: {name}.`"));
            }
            (true, true) => {
                found.push(format!("{name} has a test: take it off the list of failures without one"));
            }
            _ => {}
        }
    }
    found
}

/// One test.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Test {
    file: PathBuf,
    line: usize,
    name: String,
    promise: Option<String>,
    failures: BTreeSet<String>,
}

impl Test {
    fn new(file: &Path, line: usize, name: String, docs: &[String]) -> Self {
        let failures = docs.iter().filter_map(|doc| doc.trim().strip_prefix("Failure: "));
        let failures =
            failures.flat_map(|names| names.trim_end_matches('.').split(", ")).map(str::to_owned).collect();
        let first: Vec<&str> = docs.iter().map(|doc| doc.trim()).take_while(|doc| !doc.is_empty()).collect();
        let promise = first.join(" ");
        let promise = (!promise.is_empty() && !promise.starts_with("Failure: ")).then_some(promise);
        Self { file: file.to_owned(), line, name, promise, failures }
    }

    /// What it promises, by its docs or else by its name.
    fn words(&self) -> String {
        self.promise.clone().unwrap_or_else(|| self.name.replace('_', " "))
    }

    fn place(&self) -> String {
        format!("{}:{}: {}", self.file.display(), self.line, self.name)
    }

    fn has(&self, words: &[String]) -> bool {
        let text = format!("{} {} {}", self.words(), self.name, self.file.display()).to_lowercase();
        words.iter().all(|word| text.contains(&word.to_lowercase()))
    }
}

/// The tests of every file below a folder.
fn read(root: &Path, folder: &str) -> Result<Vec<Test>> {
    let mut tests = Vec::new();
    for file in crate::rooms::sources(&root.join(folder))? {
        let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        let file = file.strip_prefix(root)?;
        tests.extend(of_file(file, &text).with_context(|| format!("parsing {}", file.display()))?);
    }
    Ok(tests)
}

fn of_file(file: &Path, text: &str) -> Result<Vec<Test>> {
    let mut reader = Reader { file, tests: Vec::new() };
    reader.visit_file(&syn::parse_file(text)?);
    Ok(reader.tests)
}

struct Reader<'a> {
    file: &'a Path,
    tests: Vec<Test>,
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item_fn(&mut self, item: &'ast ItemFn) {
        // `#[test]`, `#[tokio::test]`.
        let is_test = |a: &Attribute| a.path().segments.last().is_some_and(|last| last.ident == "test");
        if item.attrs.iter().any(is_test) {
            let docs: Vec<String> = item.attrs.iter().filter_map(doc).collect();
            let line = item.sig.ident.span().start().line;
            self.tests.push(Test::new(self.file, line, item.sig.ident.to_string(), &docs));
        }
    }

    fn visit_macro(&mut self, found: &'ast Macro) {
        let each_mode = found.path.segments.last().is_some_and(|last| last.ident == EACH_MODE);
        self.tokens(found.tokens.clone(), each_mode);
    }
}

impl Reader<'_> {
    /// Tests in what a macro is given: functions with `#[test]`, or in `each_mode!` NAME = FUNCTION.
    fn tokens(&mut self, tokens: TokenStream, each_mode: bool) {
        let (mut docs, mut is_test) = (Vec::new(), false);
        let mut tokens = tokens.into_iter().peekable();
        while let Some(token) = tokens.next() {
            match (&token, tokens.peek()) {
                (TokenTree::Punct(hash), Some(TokenTree::Group(group)))
                    if hash.as_char() == '#' && group.delimiter() == Delimiter::Bracket =>
                {
                    let group = group.clone();
                    tokens.next();
                    if let Ok(attributes) =
                        syn::parse::Parser::parse2(Attribute::parse_outer, attribute(group))
                    {
                        docs.extend(attributes.iter().filter_map(doc));
                        is_test |= attributes.iter().any(|a| a.path().is_ident("test"));
                    }
                }
                (TokenTree::Ident(word), Some(TokenTree::Ident(name))) if word == "fn" => {
                    if is_test {
                        self.push(name, &docs);
                    }
                    (docs, is_test) = (Vec::new(), false);
                }
                (TokenTree::Ident(name), Some(TokenTree::Punct(equals)))
                    if each_mode
                        && equals.as_char() == '='
                        && equals.spacing() == proc_macro2::Spacing::Alone =>
                {
                    self.push(name, &docs);
                    docs.clear();
                }
                (TokenTree::Group(group), _) => self.tokens(group.stream(), false),
                _ => {}
            }
        }
    }

    fn push(&mut self, name: &proc_macro2::Ident, docs: &[String]) {
        self.tests.push(Test::new(self.file, name.span().start().line, name.to_string(), docs));
    }
}

/// `#[…]`, of what is in its brackets.
fn attribute(group: proc_macro2::Group) -> TokenStream {
    let hash = proc_macro2::Punct::new('#', proc_macro2::Spacing::Alone);
    [TokenTree::Punct(hash), TokenTree::Group(group)].into_iter().collect()
}

/// A line of documentation.
fn doc(attribute: &Attribute) -> Option<String> {
    let pair = attribute.meta.require_name_value().ok().filter(|pair| pair.path.is_ident("doc"))?;
    match &pair.value {
        syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(text), .. }) => Some(text.value()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Vec<Test> {
        of_file(Path::new("x.rs"), text).expect("it can be parsed")
    }

    /// A promise is the first paragraph of a test's docs, wherever the test stands.
    #[test]
    fn promises_are_read_of_functions_modules_and_macros() {
        let tests = read(
            "/// One.\n/// Still one.\n///\n/// Failure: limits, refused.\n#[test] fn a() {}\n\
             mod inner { /// Two.\n#[tokio::test] async fn b() {} }\n\
             proptest! { /// Three.\n#[test] fn c(x in 0..4) { fn helper() {} } }\n\
             each_mode! { /// Four.\nd = |m| { let x = 1; x }; e = f; }\n#[test] fn g() {}\nfn no_test() {}",
        );
        let found: Vec<_> = tests.iter().map(|t| (t.name.as_str(), t.promise.as_deref())).collect();
        assert_eq!(
            found,
            [
                ("a", Some("One. Still one.")),
                ("b", Some("Two.")),
                ("c", Some("Three.")),
                ("d", Some("Four.")),
                ("e", None),
                ("g", None)
            ]
        );
        assert_eq!(tests[0].failures, ["limits", "refused"].map(str::to_owned).into());
        assert_eq!(tests[5].words(), "g");
    }

    /// An end-to-end test without a promise, an unknown failure and a failure without a test are mistakes.
    #[test]
    fn what_is_missing_is_named() {
        let every: String = FAILURES
            .iter()
            .filter(|f| !WITHOUT_TEST.contains(&f.name))
            .map(|f| format!("/// It holds.\n///\n/// Failure: {}.\n#[test] fn a() {{}}\n", f.name))
            .collect();
        let of = |text: &str| {
            let tests = read(text);
            mistakes(&tests, &tests)
        };
        assert_eq!(of(&every), Vec::<String>::new());
        assert_eq!(of(&format!("{every}#[test] fn silent() {{}}")).len(), 1);
        assert_eq!(of(&format!("{every}/// Failure: limits.\n#[test] fn silent() {{}}")).len(), 1);
        assert_eq!(of(&every.replace("Failure: limits.", "Failure: limit.")).len(), 2);
    }

    #[test]
    fn a_test_that_the_threat_model_names_has_to_be_there() {
        let tests = read("#[test] fn a() {}");
        assert!(unknown("as `file::test`: `x::a`, and `x`", &tests).is_empty());
        assert_eq!(unknown("`x::b`, `y::a`", &tests).len(), 2);
    }
}
