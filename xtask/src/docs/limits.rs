//! The page of limits: every constant that bounds something, from the sources, with what its comment says.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result};
use syn::{Attribute, BinOp, Expr, Item, Lit, Type, UnOp};

/// The folders whose constants are listed, with how each is called.
const ROOTS: [(&str, &str); 2] = [("tunnel-user/src", ""), ("tunnel-common/src", "tunnel-common/src/")];

/// Parts of a name that say that a constant bounds something.
const BOUNDS: [&str; 35] = [
    "AGAIN",
    "BACKLOG",
    "BUDGET",
    "BURST",
    "CREDIT",
    "DELAY",
    "DEPTH",
    "FLOWS",
    "FRAME",
    "FRAMES",
    "GROUPS",
    "HEADERS",
    "INTERVAL",
    "LIMIT",
    "LINGER",
    "LOOKUPS",
    "MAX",
    "MIN",
    "PATIENCE",
    "PAUSE",
    "POLL",
    "QUIET",
    "RECORDS",
    "RESERVED",
    "RETRIES",
    "SESSIONS",
    "SHARE",
    "SLICES",
    "SPARE",
    "STEPS",
    "STREAK",
    "STREAMS",
    "THRESHOLD",
    "TIMEOUT",
    "TURN",
];

struct Limit {
    name: String,
    value: String,
    meaning: String,
}

pub(super) fn page(root: &Path) -> Result<String> {
    let mut page = "# Limits\n\nThe constants that bound something, from the sources. What the configuration can change is in \
                    [Configuration](configuration.md); [Bounds](../internals/bounds.md) explains what they bound together.\n"
        .to_owned();
    let mut rooms: BTreeMap<String, Vec<(String, Limit)>> = BTreeMap::new();
    for (folder, prefix) in ROOTS {
        let mut files = Vec::new();
        sources(&root.join(folder), "", &mut files)?;
        files.sort();
        for file in files {
            let text = fs::read_to_string(root.join(folder).join(&file))?;
            let parsed = syn::parse_file(&text).with_context(|| format!("parsing {folder}/{file}"))?;
            let room = match (prefix, file.split_once('/')) {
                ("", Some((room, _))) => room.to_owned(),
                _ => folder.trim_end_matches("/src").to_owned(),
            };
            let mut limits = Vec::new();
            collect(&parsed.items, &mut limits);
            let limits = limits.into_iter().map(|limit| (format!("{prefix}{file}"), limit));
            rooms.entry(room).or_default().extend(limits);
        }
    }
    for (room, limits) in rooms {
        if limits.is_empty() {
            continue;
        }
        let _ = write!(page, "\n## {room}\n\n| constant | value | meaning | file |\n|---|--:|---|---|\n");
        for (file, Limit { name, value, meaning }) in limits {
            let _ = writeln!(page, "| `{name}` | {value} | {meaning} | `{file}` |");
        }
    }
    Ok(page)
}

fn sources(folder: &Path, name: &str, files: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let file = entry.file_name().to_string_lossy().into_owned();
        let path = if name.is_empty() { file.clone() } else { format!("{name}/{file}") };
        if entry.file_type()?.is_dir() {
            if file != "tests" {
                sources(&entry.path(), &path, files)?;
            }
        } else if file.ends_with(".rs") && file != "tests.rs" {
            files.push(path);
        }
    }
    Ok(())
}

fn collect(items: &[Item], limits: &mut Vec<Limit>) {
    for item in items {
        match item {
            Item::Mod(module) if !module.attrs.iter().any(is_test) => {
                collect(module.content.as_ref().map_or(&[], |(_, items)| items), limits);
            }
            Item::Const(constant) => {
                let name = constant.ident.to_string();
                let duration = type_name(&constant.ty) == "Duration";
                let bounds = name.split('_').any(|part| BOUNDS.contains(&part));
                let (Some(meaning), Some(value)) = (meaning(&constant.attrs), value(&constant.expr)) else {
                    continue;
                };
                if duration || bounds && is_number(&constant.ty) {
                    limits.push(Limit { name, value, meaning });
                }
            }
            _ => {}
        }
    }
}

fn is_test(attribute: &Attribute) -> bool {
    attribute.path().is_ident("cfg")
        && attribute.parse_args::<syn::Path>().is_ok_and(|condition| condition.is_ident("test"))
}

fn type_name(ty: &Type) -> String {
    match ty {
        Type::Path(path) => path.path.segments.last().map(|last| last.ident.to_string()).unwrap_or_default(),
        _ => String::new(),
    }
}

fn is_number(ty: &Type) -> bool {
    let name = type_name(ty);
    matches!(&*name, "u8" | "u16" | "u32" | "u64" | "usize" | "i32" | "i64") || name.starts_with("NonZero")
}

/// What the comment says, on one line; none where there is no comment.
fn meaning(attributes: &[Attribute]) -> Option<String> {
    let mut lines = Vec::new();
    for attribute in attributes {
        if let syn::Meta::NameValue(meta) = &attribute.meta
            && meta.path.is_ident("doc")
            && let Expr::Lit(text) = &meta.value
            && let Lit::Str(text) = &text.lit
        {
            lines.push(text.value().trim().to_owned());
        }
    }
    // Links of rustdoc lead nowhere here.
    let text = lines.join(" ").replace("[`", "`").replace("`]", "`").replace('|', "\\|").replace('<', "&lt;");
    (!text.is_empty()).then_some(text)
}

/// The value for people: `64 KiB`, `1.5 s`, `4,096`; none of what is computed by more than arithmetic.
fn value(expr: &Expr) -> Option<String> {
    if let Some(n) = number(expr) {
        return Some(shown(n));
    }
    let Expr::Call(call) = expr else {
        let Expr::MethodCall(call) = expr else { return None };
        // `NonZeroU32::new(3).expect("not 0")`
        return (call.method == "expect" || call.method == "unwrap").then(|| value(&call.receiver)).flatten();
    };
    let Expr::Path(path) = &*call.func else { return None };
    let n = number(call.args.first()?)?;
    match &*path.path.segments.last()?.ident.to_string() {
        "from_secs" if n >= 120 && n % 60 == 0 => Some(format!("{} min", n / 60)),
        "from_secs" => Some(format!("{n} s")),
        "from_millis" => Some(format!("{n} ms")),
        "new" => Some(shown(n)),
        _ => None,
    }
}

fn number(expr: &Expr) -> Option<i128> {
    match expr {
        Expr::Lit(lit) => match &lit.lit {
            Lit::Int(n) => n.base10_parse().ok(),
            _ => None,
        },
        Expr::Paren(inner) => number(&inner.expr),
        Expr::Cast(cast) => number(&cast.expr),
        Expr::Unary(unary) => {
            matches!(unary.op, UnOp::Neg(_)).then(|| number(&unary.expr).map(|n| -n)).flatten()
        }
        Expr::Binary(binary) => {
            let (left, right) = (number(&binary.left)?, number(&binary.right)?);
            match binary.op {
                BinOp::Add(_) => left.checked_add(right),
                BinOp::Sub(_) => left.checked_sub(right),
                BinOp::Mul(_) => left.checked_mul(right),
                BinOp::Div(_) => left.checked_div(right),
                BinOp::Shl(_) => left.checked_shl(right.try_into().ok()?),
                _ => None,
            }
        }
        _ => None,
    }
}

fn shown(n: i128) -> String {
    const KIB: i128 = 1 << 10;
    const MIB: i128 = 1 << 20;
    if n >= MIB && n % MIB == 0 {
        return format!("{} Mi", n / MIB);
    }
    // From 16 Ki on, powers of two are sizes.
    if n >= 16 * KIB && n % KIB == 0 {
        return format!("{} Ki", n / KIB);
    }
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) && digits.as_bytes()[i - 1].is_ascii_digit() {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(text: &str) -> Vec<String> {
        let mut limits = Vec::new();
        collect(&syn::parse_file(text).unwrap().items, &mut limits);
        limits.into_iter().map(|l| format!("{} {} {}", l.name, l.value, l.meaning)).collect()
    }

    #[test]
    fn constants_that_bound_something_are_listed_with_their_value_and_meaning() {
        let text = "/// The\n/// most.\nconst READ_MAX: usize = 64 * 1024;\n\
                    /// Long.\nconst GRACE: Duration = Duration::from_millis(500);\n\
                    /// Few.\nconst RETRIES: NonZeroU32 = NonZeroU32::new(3).expect(\"not 0\");\n\
                    /// A number of the protocol's.\nconst KEY_UPDATE: u8 = 24;\nconst BARE_MAX: u8 = 1;\n\
                    #[cfg(test)]\nmod tests { /// Of a test.\nconst A_MAX: u8 = 1; }";
        assert_eq!(limits(text), ["READ_MAX 64 Ki The most.", "GRACE 500 ms Long.", "RETRIES 3 Few."]);
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(
            [shown(50_000), shown(4096), shown(-4), shown(16 << 20)],
            ["50,000", "4,096", "-4", "16 Mi"]
        );
    }
}
