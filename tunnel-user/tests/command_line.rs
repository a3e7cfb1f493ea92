//! The program as a script sees it: exit codes, and what is printed on which stream. No privilege is needed.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

fn tunnel(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunnel"));
    command.args(args).env_remove("TUNNEL_LOG").output().expect("the program starts")
}

fn said(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn five_mistakes_are_all_reported_and_the_status_is_64() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("agent.toml");
    let text = "[[listener]]\nadress = \"0.0.0.0:15008\"\n\n[[route]]\n\
        match = { destination = [\"10.0.0.1/8\"] }\nto = [{ upstream = \"east\" }]\n\n[daemon]\nworkers = true\n";
    fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    let (status, _, err) = said(&tunnel(&["config", "check", file]));
    assert_eq!(status, Some(64));
    for mistake in [
        ":1:1: listener.address: is missing",
        ":1:1: listener: needs a certificate",
        ":2:1: listener.adress: unknown key `adress`, did you mean `address`?",
        ":5:26: route.match.destination[0]: ",
        ":6:20: route.to[0].upstream: no upstream is named \"east\"",
        ":9:11: daemon.workers: must be an integer, not a boolean",
    ] {
        assert!(err.lines().any(|l| l.starts_with(&format!("{file}{mistake}"))), "{mistake} not in:\n{err}");
    }
}

#[test]
fn what_was_typed_wrong_is_64_and_help_is_0() {
    for wrong in [&["exec"][..], &["no-such"], &[], &["gateway", "--listen", "0.0.0.0"]] {
        let (status, out, err) = said(&tunnel(wrong));
        assert_eq!((status, out.as_str()), (Some(64), ""), "{wrong:?}");
        assert!(err.contains("--help") || err.contains("Usage"), "{wrong:?}: {err}");
    }
    for right in [&["--help"][..], &["exec", "--help"], &["--version"], &["completions", "zsh"], &["man"]] {
        let (status, out, err) = said(&tunnel(right));
        assert_eq!((status, err.as_str()), (Some(0), ""), "{right:?}");
        assert!(out.contains("tunnel"), "{right:?}");
    }
    let (status, _, err) = said(&tunnel(&["config", "check", "no-such.toml"]));
    assert_eq!(status, Some(64));
    assert!(err.contains("no-such.toml: No such file"), "{err}");
}

#[test]
fn the_schema_is_json() {
    let (status, out, _) = said(&tunnel(&["config", "schema"]));
    assert_eq!(status, Some(0));
    let schema: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
}

#[test]
fn a_made_identity_passes_the_check_of_a_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    assert_eq!(said(&tunnel(&["pki", "init", &path("")])).0, Some(0));
    let issue =
        ["pki", "issue", "--id", "spiffe://example.org/gateway", "--dir", &path(""), "--name", "gateway"];
    assert_eq!(said(&tunnel(&issue)).0, Some(0));
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/gateway.toml");
    fs::copy(example, path("gateway.toml")).unwrap();
    let check = ["config", "check", &path("gateway.toml")];
    let (status, out, err) = said(&tunnel(&check));
    assert_eq!((status, err.as_str()), (Some(0), ""));
    assert!(out.ends_with("gateway.toml: no mistakes\n"), "{out}");

    fs::copy(path("ca-key.pem"), path("gateway-key.pem")).unwrap();
    let (status, _, err) = said(&tunnel(&check));
    assert_eq!(status, Some(64));
    assert!(err.contains("the key is not the one of the certificate"), "{err}");

    let (status, _, err) = said(&tunnel(&["pki", "init", &path("")]));
    assert_eq!(status, Some(64));
    assert!(err.contains("ca.pem already exists; --force replaces it"), "{err}");
}
