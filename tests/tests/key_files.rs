//! Certificates and keys as tools write them: each works, or the error names the file, what it holds, and what helps.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result};
use tunnel_tests::{World, process, programs};

/// How a file is spoiled, by a script of sh beside `pki/`, and what is said of it then.
struct Odd {
    script: &'static str,
    /// Which file, without `.pem`.
    file: &'static str,
    /// The cause, and the remedy.
    said: [&'static str; 2],
}

const fn odd(file: &'static str, script: &'static str, said: [&'static str; 2]) -> Odd {
    Odd { script, file, said }
}

/// Runs a script in `folder`.
fn sh(folder: &Path, script: &str) -> Result<String> {
    let mut command = Command::new(programs::system("sh")?);
    // As a careful person's shell: what tools write is not for others.
    command.args(["-euc", &format!("umask 077; {script}")]).current_dir(folder);
    process::output(&mut command).with_context(|| script.to_owned())
}

/// What `tunnel gateway` says that cannot start with what the script has made of a copy of the files.
fn refusal(world: &World, script: &str) -> Result<String> {
    said(world, script, "20", 64)
}

/// What it says with what the script has made of a copy of the files, within so many seconds, and how it ends: 124 where it
/// has run for as long.
fn said(world: &World, script: &str, seconds: &str, status: i32) -> Result<String> {
    let folder = world.folder().join("odd");
    let pki = world.pki().ca();
    let pki = pki.parent().context("a folder")?.display().to_string();
    sh(world.folder(), &format!("rm -rf odd; cp -r {pki} odd"))?;
    sh(&folder, script)?;
    let mut command = world.net().command(&programs::system("timeout")?);
    command.arg(seconds).arg(programs::tunnel()?).current_dir(&folder).args([
        "gateway",
        "--listen",
        "127.0.0.1:0",
        "--allow",
        "10.200.0.10:80",
    ]);
    command.args(["--ca", "ca.pem", "--cert", "gateway.pem", "--key", "gateway-key.pem"]);
    let done = command.output()?;
    assert_eq!(done.status.code(), Some(status), "{script}: {done:?}");
    Ok(String::from_utf8_lossy(&done.stderr).into_owned())
}

fn assert_said(world: &World, cases: &[Odd]) -> Result<()> {
    for Odd { script, file, said } in cases {
        let err = refusal(world, script)?;
        let name = format!("{file}.pem: ");
        let line =
            err.lines().find(|line| line.contains(&name)).with_context(|| format!("{script}: {err}"))?;
        for words in said {
            assert!(line.contains(words), "{script}\n  wanted {words:?}\n  said {line}");
        }
    }
    Ok(())
}

/// A private key that cannot be used is refused with its kind, and with the command that makes one that can be.
#[test]
fn a_key_that_cannot_be_used_is_named_by_its_kind_with_the_remedy() -> Result<()> {
    const KEY: &str = "gateway-key";
    let pass = ["is encrypted with a passphrase", "openssl pkey -in gateway-key.pem -out"];
    let kind = |what| [what, "openssl genpkey"];
    assert_said(
        &World::new()?,
        &[
            odd(
                KEY,
                "openssl pkey -in gateway-key.pem -aes256 -passout pass:x -out k; mv k gateway-key.pem",
                pass,
            ),
            odd(
                KEY,
                "openssl ec -in gateway-key.pem -aes256 -passout pass:x -out k 2>&1; mv k gateway-key.pem",
                pass,
            ),
            odd(
                KEY,
                "openssl pkcs8 -topk8 -in gateway-key.pem -passout pass:x -outform DER -out k; mv k gateway-key.pem",
                ["is encrypted with a passphrase", "openssl pkey"],
            ),
            odd(
                KEY,
                "openssl pkey -in gateway-key.pem -outform DER -out k; mv k gateway-key.pem",
                ["private key in DER", "openssl pkey -inform DER -in gateway-key.pem"],
            ),
            odd(
                KEY,
                "openssl ec -in gateway-key.pem -outform DER -out k 2>&1; mv k gateway-key.pem",
                ["private key in DER", "openssl pkey -inform DER -in gateway-key.pem"],
            ),
            odd(
                KEY,
                "openssl pkcs12 -export -in gateway.pem -inkey gateway-key.pem -passout pass: -out k; mv k gateway-key.pem",
                ["PKCS#12", "openssl pkcs12 -in gateway-key.pem -nocerts"],
            ),
            odd(
                KEY,
                "openssl pkey -in gateway-key.pem -pubout -out k; mv k gateway-key.pem",
                ["a public key in it and no private key", "name the file of the private key"],
            ),
            odd(
                KEY,
                "cp gateway.pem gateway-key.pem",
                ["a certificate in it and no private key", "name the file"],
            ),
            odd(
                KEY,
                "openssl req -new -key gateway-key.pem -subj / -out k; mv k gateway-key.pem",
                ["a request for a certificate (CSR)", "name the file of the key"],
            ),
            odd(
                KEY,
                "openssl ecparam -name prime256v1 -out gateway-key.pem",
                ["no private key in it, only \"EC PARAMETERS\"", "a private key in PEM"],
            ),
            odd(KEY, ": > gateway-key.pem", ["the file is empty", "write a private key"]),
            odd(KEY, "echo hello > gateway-key.pem", ["it is not PEM", "a private key in PEM"]),
            odd(KEY, "rm gateway-key.pem; mkdir gateway-key.pem", ["Is a directory", "name the file in it"]),
            odd(
                KEY,
                "head -c 150 gateway-key.pem > k; mv k gateway-key.pem",
                ["that begins in line 1 does not end", "copy the file again"],
            ),
            odd(
                KEY,
                "sed 's/^/  /' gateway-key.pem > k; mv k gateway-key.pem",
                ["line 1 has text around", "remove the indentation"],
            ),
            odd(
                KEY,
                "iconv -f ASCII -t UTF-16 gateway-key.pem > k; mv k gateway-key.pem",
                ["UTF-16", "iconv -f UTF-16 -t ASCII gateway-key.pem"],
            ),
            odd(KEY, "openssl genrsa -out gateway-key.pem 1024 2>&1", kind("of RSA with 1024 bits")),
            odd(
                KEY,
                "openssl genrsa -traditional -out gateway-key.pem 1024 2>&1",
                kind("of RSA with 1024 bits"),
            ),
            odd(
                KEY,
                "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:secp256k1 -out gateway-key.pem",
                kind("of the curve secp256k1"),
            ),
            odd(
                KEY,
                "openssl ecparam -name secp256k1 -genkey -noout -out gateway-key.pem",
                kind("of the curve secp256k1"),
            ),
            odd(KEY, "openssl genpkey -algorithm ED448 -out gateway-key.pem", kind("of Ed448")),
            odd(KEY, "openssl genpkey -algorithm X25519 -out gateway-key.pem", kind("for key agreement")),
        ],
    )
}

/// A certificate that cannot be used, or does not belong to the key, is named by its place, with the remedy.
#[test]
fn a_certificate_that_cannot_be_used_is_named_by_its_place_with_the_remedy() -> Result<()> {
    const CERT: &str = "gateway";
    assert_said(
        &World::new()?,
        &[
            odd(
                CERT,
                "openssl x509 -in gateway.pem -outform DER -out c; mv c gateway.pem",
                ["a certificate in DER", "openssl x509 -inform DER -in gateway.pem"],
            ),
            odd(
                CERT,
                "openssl x509 -in gateway.pem -trustout -out c; mv c gateway.pem",
                ["OpenSSL's own label", "openssl x509 -in gateway.pem"],
            ),
            odd(
                CERT,
                "openssl crl2pkcs7 -nocrl -certfile gateway.pem -out c; mv c gateway.pem",
                ["PKCS#7", "openssl pkcs7 -print_certs -in gateway.pem"],
            ),
            odd(
                CERT,
                "openssl crl2pkcs7 -nocrl -certfile gateway.pem -outform DER -out c; mv c gateway.pem",
                ["PKCS#7", "openssl pkcs7 -inform DER"],
            ),
            odd(
                CERT,
                "openssl pkcs12 -export -in gateway.pem -inkey gateway-key.pem -passout pass: -out c; mv c gateway.pem",
                ["PKCS#12", "openssl pkcs12 -in gateway.pem -nokeys"],
            ),
            odd(
                CERT,
                "openssl req -new -key gateway-key.pem -subj / -out gateway.pem",
                ["a request for a certificate (CSR)", "openssl x509 -req -in gateway.pem"],
            ),
            odd(
                CERT,
                "cp gateway-key.pem gateway.pem",
                ["a private key in it and no certificate", "confused"],
            ),
            odd(
                CERT,
                "openssl pkey -in gateway-key.pem -pubout -out gateway.pem",
                ["a public key in it", "have a CA"],
            ),
            odd(CERT, ": > gateway.pem", ["the file is empty", "write a certificate"]),
            odd(
                CERT,
                "cat ca.pem gateway.pem > c; mv c gateway.pem",
                ["the key in gateway-key.pem is that of certificate 2 (line ", "has to stand first"],
            ),
            odd(
                "gateway-key",
                "cp node-key.pem gateway-key.pem",
                ["is not the one of", "openssl pkey -in gateway-key.pem"],
            ),
            odd(
                CERT,
                "openssl ecparam -name prime256v1 -param_enc explicit -genkey -noout -out gateway-key.pem
                 openssl req -new -key gateway-key.pem -subj / -out r
                 echo subjectAltName=DNS:gateway.test > e
                 openssl x509 -req -in r -CA ca.pem -CAkey ca-key.pem -CAcreateserial -extfile e -out gateway.pem 2>&1",
                ["certificate 1 (line 1) has a curve that is written out", "openssl genpkey"],
            ),
            odd(
                CERT,
                "openssl req -new -key gateway-key.pem -subj /CN=old -out r
                 openssl x509 -req -in r -CA ca.pem -CAkey ca-key.pem -CAcreateserial -out gateway.pem 2>&1",
                ["certificate 1 (line 1), CN=old cannot be used: UnsupportedCertVersion", "replace or remove it"],
            ),
            odd(
                CERT,
                "sed '/BEGIN/a !!!!' gateway.pem > c; mv c gateway.pem",
                ["certificate 1 (line 1) cannot be decoded", "copy the file again"],
            ),
        ],
    )
}

/// One root of many that cannot be used is left out, and named by its number, its line, and its name where that can be read.
#[test]
fn one_broken_root_of_many_is_named() -> Result<()> {
    // Of X.509 version 2, which nobody issues: it can be read, and not be used.
    let odd_version = "openssl x509 -in ca.pem -outform DER \
          | perl -0777 -pe 's/\\xa0\\x03\\x02\\x01\\x02/\\xa0\\x03\\x02\\x01\\x01/' | base64 > v2
        { cat ca.pem ca.pem; echo '-----BEGIN CERTIFICATE-----'; cat v2; echo '-----END CERTIFICATE-----'; cat ca.pem; } > c
        mv c ca.pem";
    let world = World::new()?;
    for (script, words) in [
        (odd_version, ["certificate 3 (line ", "CN="]),
        (
            "{ cat ca.pem; printf -- '-----BEGIN CERTIFICATE-----\\nAAAA\\n-----END CERTIFICATE-----\\n'; cat ca.pem; } > c
             mv c ca.pem",
            ["certificate 2 (line ", "replace or remove it"],
        ),
        (
            "{ cat ca.pem; printf -- '-----BEGIN CERTIFICATE-----\\n!\\n-----END CERTIFICATE-----\\n'; } > c; mv c ca.pem",
            ["certificate 2 (line ", "cannot be decoded"],
        ),
    ] {
        let log = said(&world, script, "2", 124)?;
        let line = log.lines().find(|line| line.contains("left out a CA certificate"));
        let line = line.with_context(|| format!("{script}: {log}"))?;
        assert!(words.iter().all(|word| line.contains(word)), "{script}\n  wanted {words:?}\n  said {line}");
    }
    Ok(())
}

/// What stands beside a certificate or a key, or around its lines, is left alone.
#[test]
fn files_with_something_beside_their_certificate_or_key_work() -> Result<()> {
    let world = World::new()?;
    let files = world.pki().named("gateway");
    let folder = files.cert.parent().context("a folder")?.to_owned();
    sh(&folder, "cp gateway.pem cert.ok; cp gateway-key.pem key.ok")?;
    for (what, script) in [
        ("CRLF", "for f in gateway gateway-key; do sed -i 's/$/\\r/' $f.pem; done"),
        (
            "a byte order mark",
            "for f in gateway gateway-key; do { printf '\\357\\273\\277'; cat $f.pem; } > t; mv t $f.pem; done",
        ),
        (
            "text around",
            "for f in gateway gateway-key; do { echo text; cat $f.pem; echo more; } > t; mv t $f.pem; done",
        ),
        (
            "key and certificate in both",
            "cat key.ok cert.ok > gateway.pem; cat cert.ok key.ok > gateway-key.pem",
        ),
        (
            "an encrypted key before the certificate",
            "{ openssl ec -in key.ok -aes256 -passout pass:x 2>t; cat cert.ok; } > gateway.pem",
        ),
        (
            "EC parameters in front",
            "{ openssl ecparam -name prime256v1; openssl ec -in key.ok 2>t; } > gateway-key.pem",
        ),
    ] {
        sh(&folder, &format!("cp cert.ok gateway.pem; cp key.ok gateway-key.pem; {script}"))?;
        let mut gateway = world.gateway().start().context(what)?;
        assert!(gateway.stop()?.success(), "{what}");
    }
    Ok(())
}

/// A private key that every user can read, or a group that is not the daemon's, is refused with who can and what helps.
#[test]
fn a_key_that_others_can_read_is_refused_with_the_remedy() -> Result<()> {
    const KEY: &str = "gateway-key";
    let remedy = "chmod 600 gateway-key.pem";
    assert_said(
        &World::new()?,
        &[
            odd(KEY, "chmod 644 gateway-key.pem", ["can be read by every user", remedy]),
            odd(
                KEY,
                "chown :65534 gateway-key.pem; chmod 640 gateway-key.pem",
                ["read by group 65534", remedy],
            ),
        ],
    )
}

/// `tunnel config check` is run by root, and the daemon as its user: a key for a group is a warning that names the group, and one
/// for everybody is refused.
#[test]
fn config_check_warns_of_a_key_for_a_group_and_refuses_one_for_everybody() -> Result<()> {
    let world = World::new()?;
    let files = world.pki().named("gateway");
    let identity = files.toml();
    let config =
        format!("{identity}[[listener]]\naddress = \"127.0.0.1:15008\"\n[[route]]\nto = \"direct\"\n");
    let config = world.file("check.toml", config)?;
    let folder = files.key.parent().context("a folder")?;
    for (script, code, said) in [
        (
            "chown :65534 gateway-key.pem; chmod 640 gateway-key.pem",
            0,
            "group 65534 can read the private key: the daemon has to be in that group",
        ),
        ("chmod 644 gateway-key.pem", 64, "the private key can be read by every user: chmod 600"),
        ("chmod 600 gateway-key.pem", 0, ""),
    ] {
        sh(folder, script)?;
        let done = Command::new(programs::tunnel()?).args(["config", "check"]).arg(&config).output()?;
        let err = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(code), "{script}: {err}");
        assert!(err.contains(said), "{script}\n  wanted {said:?}\n  said {err}");
        assert_eq!(err.contains("private key"), !said.is_empty(), "{script}: {err}");
    }
    Ok(())
}
