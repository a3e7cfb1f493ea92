//! Reads a table of TOML by the one definition that also makes its schema.
//!
//! A section asks a [`Reader`] for each of its keys. With a document behind it the reader gives values and collects every
//! mistake with its line, column and key; without one it collects the schema.
//!
//! # Invariants
//! - A key that a section does not ask for is a mistake, and one that it asks for is in the schema.
//! - The first mistake ends nothing.

use std::{cell::RefCell, collections::BTreeMap, ops::Range, path::Path};

use serde_json::{Value as Json, json};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::Mistake;

/// A table with keys that are known by name.
pub(crate) trait Section: Sized {
    /// Asks for every key, and only then gives up where one that it needs is missing: in schema mode
    /// nothing is ever there.
    fn read(r: &mut Reader<'_>) -> Option<Self>;
}

/// What stands behind a key.
pub(crate) trait Value: Sized {
    /// Its JSON Schema.
    fn schema() -> Json;
    /// Reads it; on a mistake reports that to `cell` and returns nothing.
    fn read(cell: &Cell<'_>) -> Option<Self>;
    /// How a default of this type is written in the schema.
    fn show(&self) -> Json;
}

/// What a configuration is read for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A daemon.
    Daemon,
    /// One command, which brings its own cgroup; the first capture says what of it is captured.
    Exec,
    /// One command, which brings its own cgroup; flags say what of it is captured.
    ExecByFlags,
    /// A daemon, beside what its file says: routes are there.
    Layer,
}

/// What a whole document shares: where it stands, and its mistakes so far.
pub(crate) struct Document<'a> {
    text: &'a str,
    root: &'a DeTable<'a>,
    /// What relative paths are relative to.
    pub(crate) base: &'a Path,
    /// Whether files that are named must exist.
    pub(crate) check_files: bool,
    purpose: Purpose,
    /// The parser had to guess: what seems missing may have been lost there.
    guessed: bool,
    mistakes: RefCell<Vec<Mistake>>,
}

impl<'a> Document<'a> {
    /// Parses `text` and reads `S` from its root. The mistakes come in the order of the text.
    pub(crate) fn read<S: Section>(
        text: &'a str,
        base: &'a Path,
        check_files: bool,
        purpose: Purpose,
    ) -> Result<S, Vec<Mistake>> {
        let (root, errors) = DeTable::parse_recoverable(text);
        let guessed = !errors.is_empty();
        let doc = Document {
            text,
            root: root.get_ref(),
            base,
            check_files,
            purpose,
            guessed,
            mistakes: RefCell::default(),
        };
        for e in errors {
            doc.mistake(e.span().unwrap_or(0..0), "", e.message().to_owned());
        }
        let broken: Vec<_> = doc.mistakes.borrow().iter().map(|m| m.line).collect();
        let read = doc.table::<S>(root.get_ref(), 0..0, String::new());
        let mut mistakes = doc.mistakes.into_inner();
        // What else seems wrong on a line that is not TOML is a guess of the parser's, not the writer's.
        mistakes.retain(|m| m.key.is_empty() || !broken.contains(&m.line));
        mistakes.sort_by_key(|m| (m.line, m.column));
        mistakes.dedup();
        match read {
            Some(value) if mistakes.is_empty() => Ok(value),
            _ => Err(mistakes),
        }
    }

    fn table<S: Section>(&self, table: &DeTable<'_>, span: Range<usize>, path: String) -> Option<S> {
        let mut r = Reader { doc: Some(self), table: Some(table), span, path, keys: Vec::new() };
        let read = S::read(&mut r);
        r.report_unknown();
        read
    }

    pub(crate) fn mistake(&self, at: Range<usize>, key: &str, message: String) {
        let before = &self.text[..self.text.floor_char_boundary(at.start)];
        let line_start = before.rfind('\n').map_or(0, |i| i + 1);
        self.mistakes.borrow_mut().push(Mistake {
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
            key: key.to_owned(),
            message,
        });
    }
}

/// One value, with the place to report about it.
#[derive(Clone)]
pub(crate) struct Cell<'a> {
    pub(crate) doc: &'a Document<'a>,
    value: &'a DeValue<'a>,
    span: Range<usize>,
    key: String,
}

impl<'a> Cell<'a> {
    /// Reports a mistake here.
    pub(crate) fn wrong<T>(&self, message: impl Into<String>) -> Option<T> {
        self.doc.mistake(self.span.clone(), &self.key, message.into());
        None
    }

    fn wrong_type<T>(&self, wanted: &str) -> Option<T> {
        let found = self.value.type_str();
        let article = if found.starts_with(['a', 'i']) { "an" } else { "a" };
        self.wrong(format!("must be {wanted}, not {article} {found}"))
    }

    /// The text; `wanted` describes what should be there.
    pub(crate) fn text(&self, wanted: &str) -> Option<&'a str> {
        match self.value {
            DeValue::String(s) => Some(s),
            _ => self.wrong_type(wanted),
        }
    }

    pub(crate) fn is_text(&self) -> bool {
        self.value.is_str()
    }

    pub(crate) fn is_integer(&self) -> bool {
        matches!(self.value, DeValue::Integer(_))
    }

    pub(crate) fn is_table(&self) -> bool {
        self.value.is_table()
    }

    /// The integer, which must be from `min` to `max`.
    pub(crate) fn integer(&self, min: u64, max: u64) -> Option<u64> {
        let DeValue::Integer(i) = self.value else {
            return self.wrong_type("an integer");
        };
        match u64::from_str_radix(i.as_str(), i.radix()) {
            Ok(n) if (min..=max).contains(&n) => Some(n),
            _ => self.wrong(format!("must be from {min} to {max}, not {i}")),
        }
    }

    /// The number.
    pub(crate) fn number(&self, wanted: &str) -> Option<f64> {
        let text = match self.value {
            DeValue::Integer(i) if i.radix() == 10 => i.as_str(),
            DeValue::Float(f) => f.as_str(),
            _ => return self.wrong_type(wanted),
        };
        text.parse().map_or_else(|_| self.wrong_type(wanted), Some)
    }

    /// The truth value.
    pub(crate) fn boolean(&self) -> Option<bool> {
        match self.value {
            DeValue::Boolean(b) => Some(*b),
            _ => self.wrong_type("true or false"),
        }
    }

    /// The items of the list; `wanted` describes what should be there.
    pub(crate) fn items(&self, wanted: &str) -> Option<Vec<Cell<'a>>> {
        let DeValue::Array(items) = self.value else {
            return self.wrong_type(wanted);
        };
        let cell = |(i, v): (usize, &'a Spanned<DeValue<'a>>)| Cell {
            doc: self.doc,
            value: v.get_ref(),
            span: v.span(),
            key: format!("{}[{i}]", self.key),
        };
        Some(items.iter().enumerate().map(cell).collect())
    }

    /// Keys and values of a table whose keys are free.
    pub(crate) fn entries(&self, wanted: &str) -> Option<Vec<(&'a str, Cell<'a>)>> {
        let DeValue::Table(table) = self.value else {
            return self.wrong_type(wanted);
        };
        let cell = |(k, v): (&'a Spanned<std::borrow::Cow<'a, str>>, &'a Spanned<DeValue<'a>>)| {
            let key = format!("{}.{}", self.key, k.get_ref());
            (k.get_ref().as_ref(), Cell { doc: self.doc, value: v.get_ref(), span: v.span(), key })
        };
        Some(table.iter().map(cell).collect())
    }

    /// The table, read as a section.
    pub(crate) fn section<S: Section>(&self) -> Option<S> {
        match self.value {
            DeValue::Table(table) => self.doc.table(table, self.span.clone(), self.key.clone()),
            _ => self.wrong_type("a table"),
        }
    }
}

/// A value that a later check may have to complain about.
pub(crate) struct At<T> {
    pub(crate) value: T,
    span: Range<usize>,
    key: String,
}

impl<T: Value> Value for At<T> {
    fn schema() -> Json {
        T::schema()
    }
    fn read(cell: &Cell<'_>) -> Option<Self> {
        Some(Self { value: T::read(cell)?, span: cell.span.clone(), key: cell.key.clone() })
    }
    fn show(&self) -> Json {
        self.value.show()
    }
}

/// One table as a section sees it.
pub(crate) struct Reader<'a> {
    /// None in schema mode.
    doc: Option<&'a Document<'a>>,
    table: Option<&'a DeTable<'a>>,
    span: Range<usize>,
    path: String,
    keys: Vec<Key>,
}

struct Key {
    name: &'static str,
    /// None for a key that is known but not taken.
    schema: Option<Json>,
    required: bool,
}

impl<'a> Reader<'a> {
    /// A key that may be absent.
    pub(crate) fn optional<T: Value>(&mut self, key: &'static str, doc: &str) -> Option<T> {
        self.note(key, false, || described(T::schema(), doc));
        self.cell(key).and_then(|c| T::read(&c))
    }

    /// A key that has a default.
    pub(crate) fn default<T: Value>(&mut self, key: &'static str, doc: &str, default: T) -> T {
        self.note(key, false, || {
            let mut schema = described(T::schema(), doc);
            schema["default"] = default.show();
            schema
        });
        self.cell(key).and_then(|c| T::read(&c)).unwrap_or(default)
    }

    /// A key that must be there.
    pub(crate) fn required<T: Value>(&mut self, key: &'static str, doc: &str) -> Option<T> {
        self.note(key, true, || described(T::schema(), doc));
        self.demand(key);
        self.cell(key).and_then(|c| T::read(&c))
    }

    /// A table that may be absent: `[key]`, or `key = { .. }`.
    pub(crate) fn section<S: Section>(&mut self, key: &'static str, doc: &str) -> Option<S> {
        self.note(key, false, || described(schema_of::<S>(), doc));
        self.cell(key).and_then(|c| c.section())
    }

    /// Tables: `[[key]]`.
    pub(crate) fn sections<S: Section>(&mut self, key: &'static str, doc: &str) -> Vec<S> {
        self.note(key, false, || described(json!({ "type": "array", "items": schema_of::<S>() }), doc));
        let tables = self.cell(key).and_then(|c| {
            if c.value.is_table() {
                return c.wrong(format!("is one of several: write [[{key}]] in place of [{key}]"));
            }
            c.items(&format!("tables, each headed [[{key}]]"))
        });
        // By the line rather than by a number: that is how a reader finds the table.
        let unnumbered = |c: Cell<'a>| Cell { key: self.path_of(key), ..c };
        tables.into_iter().flatten().filter_map(|c| unnumbered(c).section()).collect()
    }

    /// One table, `[key]`, or several, `[[key]]`.
    pub(crate) fn one_or_several<S: Section>(&mut self, key: &'static str, doc: &str) -> Vec<S> {
        self.note(key, false, || {
            let one = schema_of::<S>();
            described(json!({ "anyOf": [one, { "type": "array", "items": one }] }), doc)
        });
        let Some(cell) = self.cell(key) else { return Vec::new() };
        if cell.is_table() {
            return cell.section().into_iter().collect();
        }
        let tables = cell.items(&format!("a table, [{key}], or several, each headed [[{key}]]"));
        let unnumbered = |c: Cell<'a>| Cell { key: self.path_of(key), ..c };
        tables.into_iter().flatten().filter_map(|c| unnumbered(c).section()).collect()
    }

    /// A key that is asked for and cannot be, and why.
    pub(crate) fn never(&mut self, key: &'static str, why: &str) {
        self.keys.push(Key { name: key, schema: None, required: false });
        if let Some(cell) = self.cell(key) {
            cell.wrong::<()>(why);
        }
    }

    /// The text behind the first of `inner` that is there, in each table of `[[key]]`, also of those that have
    /// other mistakes.
    pub(crate) fn texts_in(&self, key: &'static str, inner: &[&str]) -> Vec<At<String>> {
        let Some(DeValue::Array(tables)) = self.cell(key).map(|c| c.value) else {
            return Vec::new();
        };
        let text = |t: &Spanned<DeValue<'_>>| {
            let (inner, value) = inner.iter().find_map(|i| Some((i, t.get_ref().get(*i)?)))?;
            let key = format!("{}.{inner}", self.path_of(key));
            Some(At { value: value.get_ref().as_str()?.to_owned(), span: value.span(), key })
        };
        tables.iter().filter_map(text).collect()
    }

    /// The texts behind the first of `one` and the first of `other`, in each table of `[[key]]` that has both.
    pub(crate) fn pairs_in(&self, key: &str, one: &[&str], other: &[&str]) -> Vec<(String, String)> {
        let Some(DeValue::Array(tables)) = self.cell(key).map(|c| c.value) else {
            return Vec::new();
        };
        let text = |t: &Spanned<DeValue<'_>>, inner: &[&str]| {
            let value = inner.iter().find_map(|i| t.get_ref().get(*i))?;
            Some(value.get_ref().as_str()?.to_owned())
        };
        tables.iter().filter_map(|t| Some((text(t, one)?, text(t, other)?))).collect()
    }

    /// Whether each table of `[[key]]` says `inner = said`.
    pub(crate) fn all_say(&self, key: &str, inner: &str, said: bool) -> bool {
        self.all(key, |t| says(t, inner, said))
    }

    /// Whether each table of `[[key]]` says `inner = said`, or has the key `other`.
    pub(crate) fn all_say_or_have(&self, key: &str, inner: &str, said: bool, other: &str) -> bool {
        self.all(key, |t| says(t, inner, said) || t.get(other).is_some())
    }

    fn all(&self, key: &str, is: impl Fn(&DeValue<'_>) -> bool) -> bool {
        let Some(DeValue::Array(tables)) = self.cell(key).map(|c| c.value) else { return false };
        tables.iter().all(|t| is(t.get_ref()))
    }

    /// The texts of the list behind `inner` in the table behind `key`.
    pub(crate) fn texts_below(&self, key: &'static str, inner: &str) -> Vec<At<String>> {
        let list = self.cell(key).and_then(|c| c.value.get(inner));
        let Some(DeValue::Array(items)) = list.map(Spanned::get_ref) else {
            return Vec::new();
        };
        let text = |(i, item): (usize, &Spanned<DeValue<'_>>)| {
            let key = format!("{}.{inner}[{i}]", self.path_of(key));
            Some(At { value: item.get_ref().as_str()?.to_owned(), span: item.span(), key })
        };
        items.iter().enumerate().filter_map(text).collect()
    }

    /// Whether the key is there, with whatever behind it.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.cell(key).is_some()
    }

    /// Whether the configuration is for one command, which brings its own cgroup.
    pub(crate) fn for_exec(&self) -> bool {
        self.doc.is_some_and(|doc| matches!(doc.purpose, Purpose::Exec | Purpose::ExecByFlags))
    }

    /// Whether it stands beside what a file says.
    pub(crate) fn is_layer(&self) -> bool {
        self.doc.is_some_and(|doc| doc.purpose == Purpose::Layer)
    }

    /// Whether it is for a command, and the first capture of the file says what of it is captured.
    pub(crate) fn captures_for_exec(&self) -> bool {
        self.doc.is_some_and(|doc| doc.purpose == Purpose::Exec)
    }

    /// Whether the key is there at the top of the file.
    pub(crate) fn root_has(&self, key: &str) -> bool {
        self.doc.is_some_and(|doc| doc.root.keys().any(|k| k.get_ref() == key))
    }

    /// `value`, with the place of `key`.
    pub(crate) fn at<T>(&self, key: &str, value: T) -> At<T> {
        let span = self.cell(key).map_or(self.span.clone(), |c| c.span);
        At { value, span, key: self.path_of(key) }
    }

    /// Reports a mistake that is about several keys, at `key` if it is there, else at the table.
    pub(crate) fn wrong(&self, key: &str, message: impl Into<String>) {
        if let Some(cell) = self.cell(key) {
            cell.wrong::<()>(message);
        } else if let Some(doc) = self.doc {
            doc.mistake(self.span.clone(), &self.path_of(key), message.into());
        }
    }

    /// Reports a mistake in the `index`th item of the list behind `key`.
    pub(crate) fn wrong_item(&self, key: &str, index: usize, message: &str) {
        let items = self.cell(key).and_then(|list| list.items(""));
        if let Some(item) = items.as_ref().and_then(|items| items.get(index)) {
            item.wrong::<()>(message);
        }
    }

    /// Reports a mistake where `at` stood.
    pub(crate) fn wrong_at<T>(&self, at: &At<T>, message: impl Into<String>) {
        if let Some(doc) = self.doc {
            doc.mistake(at.span.clone(), &at.key, message.into());
        }
    }

    /// Keys that are known and there, but for these.
    pub(crate) fn others(&self, but: &[&str]) -> Vec<&'static str> {
        let known = self.keys.iter().map(|k| k.name);
        known.filter(|name| !but.contains(name) && self.has(name)).collect()
    }

    /// Reports the key as missing if it is.
    pub(crate) fn demand(&self, key: &str) {
        if !self.has(key)
            && let Some(doc) = self.doc
            && !doc.guessed
        {
            doc.mistake(self.span.clone(), &self.path_of(key), "is missing".to_owned());
        }
    }

    fn note(&mut self, name: &'static str, required: bool, schema: impl FnOnce() -> Json) {
        let schema = if self.doc.is_none() { schema() } else { Json::Null };
        self.keys.push(Key { name, schema: Some(schema), required });
    }

    fn cell(&self, key: &str) -> Option<Cell<'a>> {
        let (_, value) = self.table?.iter().find(|(k, _)| k.get_ref() == key)?;
        Some(Cell { doc: self.doc?, value: value.get_ref(), span: value.span(), key: self.path_of(key) })
    }

    fn path_of(&self, key: &str) -> String {
        match (self.path.is_empty(), key.is_empty()) {
            (true, _) => key.to_owned(),
            (false, true) => self.path.clone(),
            (false, false) => format!("{}.{key}", self.path),
        }
    }

    fn report_unknown(&self) {
        let (Some(doc), Some(table)) = (self.doc, self.table) else {
            return;
        };
        for (key, _) in table {
            let name = key.get_ref().as_ref();
            if self.keys.iter().any(|k| k.name == name) {
                continue;
            }
            let known = self.keys.iter().filter(|k| k.schema.is_some()).map(|k| k.name);
            let message = match nearest(name, known) {
                Some(meant) => format!("unknown key `{name}`, did you mean `{meant}`?"),
                None => format!("unknown key `{name}`"),
            };
            doc.mistake(key.span(), &self.path_of(name), message);
        }
    }
}

fn says(table: &DeValue<'_>, key: &str, said: bool) -> bool {
    matches!(table.get(key).map(Spanned::get_ref), Some(DeValue::Boolean(b)) if *b == said)
}

/// The JSON Schema of a section.
pub(crate) fn schema_of<S: Section>() -> Json {
    let mut r = Reader { doc: None, table: None, span: 0..0, path: String::new(), keys: Vec::new() };
    // Nothing is there to be read, so there is nothing to come back: the keys asked for are the answer.
    let _ = S::read(&mut r);
    let required: Vec<_> = r.keys.iter().filter(|k| k.required).map(|k| k.name).collect();
    let properties: BTreeMap<_, _> = r.keys.into_iter().filter_map(|k| Some((k.name, k.schema?))).collect();
    let mut schema = json!({ "type": "object", "additionalProperties": false, "properties": properties });
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    schema
}

fn described(mut schema: Json, doc: &str) -> Json {
    // Docs of a field begin with a space, and write brackets for rustdoc.
    schema["description"] = json!(doc.trim_start().replace('\\', ""));
    schema
}

/// The known word that `word` is most likely a slip of.
pub(crate) fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // One slip per three letters: two short words that differ in two are two words.
    let limit = (word.chars().count() / 3).max(1);
    known.map(|k| (distance(word, k), k)).filter(|(d, _)| *d <= limit).min().map(|(_, k)| k)
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
