//! A report as files: `report.json`, `report.html` and `plots/*.svg` in a folder. A report of another schema is refused.
//!
//! # Invariants
//! - A file is the old one or the new one, never half of either.
//! - `report.json` comes last: when it is there, so is the rest.

use std::{
    error, fmt, fs, io,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use crate::bench::model::{Report, SCHEMA};

use super::{
    html::page,
    plots::{Plot, plots},
};

/// The report, for programs.
const JSON: &str = "report.json";
/// The report, for people.
const HTML: &str = "report.html";
/// The folder of plots.
const PLOTS: &str = "plots";

/// Why a report could not be read.
#[derive(Debug)]
pub enum ReadError {
    /// There is no such file, or it may not be read.
    File(PathBuf, io::Error),
    /// It is not JSON.
    NotJson(PathBuf, serde_json::Error),
    /// It is JSON without `"schema": N`.
    NotAReport(PathBuf),
    /// It was written by another version.
    Schema(PathBuf, u64),
    /// It claims this schema, and does not keep to it.
    Broken(PathBuf, serde_json::Error),
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path, e) => write!(f, "{}: {e}", path.display()),
            Self::NotJson(path, e) => write!(f, "{} is not JSON: {e}", path.display()),
            Self::NotAReport(path) => {
                write!(f, "{} is JSON, but no report of a benchmark: it has no \"schema\"", path.display())
            }
            Self::Schema(path, found) if *found > u64::from(SCHEMA) => write!(
                f,
                "{} has schema {found}, and this program reads {SCHEMA}: a newer one has written it",
                path.display()
            ),
            Self::Schema(path, found) => write!(
                f,
                "{} has schema {found}, and this program reads {SCHEMA}: take the benchmark again",
                path.display()
            ),
            Self::Broken(path, e) => {
                write!(f, "{} has schema {SCHEMA}, but is no whole report: {e}", path.display())
            }
        }
    }
}

// Without a source: the message has it already, and whoever prints the chain would print it twice.
impl error::Error for ReadError {}

/// What could not be written.
#[derive(Debug)]
pub struct WriteError {
    /// Which file or folder.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

impl fmt::Display for WriteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot write {}: {}", self.path.display(), self.source)
    }
}

impl error::Error for WriteError {}

/// Reads a report: `report.json`, or the folder that has one.
pub fn load(path: &Path) -> Result<Report, ReadError> {
    let path = if path.is_dir() { path.join(JSON) } else { path.to_owned() };
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(e) => return Err(ReadError::File(path, e)),
    };
    let value: serde_json::Value = match serde_json::from_slice(&text) {
        Ok(value) => value,
        Err(e) => return Err(ReadError::NotJson(path, e)),
    };
    match value.get("schema").and_then(serde_json::Value::as_u64) {
        None => Err(ReadError::NotAReport(path)),
        Some(schema) if schema != u64::from(SCHEMA) => Err(ReadError::Schema(path, schema)),
        // From the text again, and not from the value: the message then has a line and a column.
        Some(_) => serde_json::from_slice(&text).map_err(|e| ReadError::Broken(path, e)),
    }
}

/// Writes a report into a folder, which is made if need be. Plots of an earlier report there that this one
/// does not have are removed: nobody could tell that they are of other numbers.
pub fn save(report: &Report, folder: &Path) -> Result<(), WriteError> {
    let drawn = plots(report);
    save_plots(&drawn, &folder.join(PLOTS))?;
    write(folder, HTML, page(report, &drawn).as_bytes())?;
    let mut json = serde_json::to_vec(report)
        .map_err(|e| WriteError { path: folder.join(JSON), source: io::Error::other(e) })?;
    json.push(b'\n');
    write(folder, JSON, &json)
}

/// Writes plots into a folder of their own, and removes others from it.
pub(super) fn save_plots(drawn: &[Plot], folder: &Path) -> Result<(), WriteError> {
    let failed = |source| WriteError { path: folder.to_owned(), source };
    fs::create_dir_all(folder).map_err(failed)?;
    for plot in drawn {
        write(folder, &format!("{}.svg", plot.name), plot.svg.as_bytes())?;
    }
    let is_drawn = |path: &Path| drawn.iter().any(|p| path.file_stem().is_some_and(|s| s == p.name.as_str()));
    remove_svgs(folder, is_drawn).map_err(failed)
}

/// Replaces a file, at once and as a whole.
pub(super) fn replace(file: &Path, bytes: &[u8]) -> Result<(), WriteError> {
    let folder = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    write(folder, &name, bytes)
}

fn remove_svgs(folder: &Path, keep: impl Fn(&Path) -> bool) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "svg") && !keep(&path) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// Beside it first, then in its place: rename(2) is atomic within a file system.
fn write(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
    let path = folder.join(name);
    let written = || {
        let mut builder = tempfile::Builder::new();
        // What is published can be read by everybody; the umask still applies.
        builder.prefix(".").suffix(".part").permissions(fs::Permissions::from_mode(0o666));
        let mut file = builder.tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(&path).map_err(|e| e.error)?;
        Ok(())
    };
    written().map_err(|source| WriteError { path: path.clone(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::fixture;

    #[test]
    fn what_was_saved_is_what_is_loaded_and_old_plots_go() {
        let folder = tempfile::tempdir().unwrap();
        let report = fixture::report();
        let stale = folder.path().join("plots/gone.svg");
        fs::create_dir(folder.path().join("plots")).unwrap();
        fs::write(&stale, "<svg/>").unwrap();
        save(&report, folder.path()).unwrap();
        save(&report, folder.path()).unwrap();
        assert!(!stale.exists());
        // Not assert_eq: nobody wants to read two reports.
        assert!(load(&folder.path().join(JSON)).unwrap() == report);
        assert!(load(folder.path()).unwrap() == report);
        let names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 3, "{names:?}");
        assert_eq!(fs::read_dir(folder.path().join(PLOTS)).unwrap().count(), plots(&report).len());
    }

    #[test]
    fn what_is_no_report_of_this_schema_is_refused_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.json");
        let error = |text: &str| {
            fs::write(&path, text).unwrap();
            load(&path).unwrap_err().to_string()
        };
        assert!(error("# no").contains("is not JSON"));
        assert!(error("{}").contains("no report"));
        assert!(error("[1]").contains("no report"));
        assert!(error(r#"{"schema": 999}"#).contains("a newer one has written it"));
        assert!(error(r#"{"schema": 0}"#).contains("take the benchmark again"));
        assert!(error(&format!(r#"{{"schema": {SCHEMA}}}"#)).contains("missing field"));
        fs::remove_file(&path).unwrap();
        let missing = load(&path).unwrap_err();
        assert!(matches!(missing, ReadError::File(..)), "{missing}");
        assert!(missing.to_string().contains("x.json"));
    }
}
