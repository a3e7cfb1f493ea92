//! What end-to-end tests are made of: two hosts, a gateway between them, and applications that know nothing.
//!
//! A test makes a [`World`]: the namespace `node`, where applications run, and the namespace `net`, which
//! only the gateway reaches. It starts a [`Gateway`], targets behind it ([`World::serve`]), and applications
//! under `tunnel exec` ([`World::exec`]), and asserts. Invariant: whatever ends a test, a panic and SIGKILL
//! included, takes its namespaces, cgroups and processes along; a test that leaves something else behind
//! fails. It never calls into the daemon's code: what is tested is the program.
//!
//! ```no_run
//! use tunnel_tests::{TARGET4, World, target};
//!
//! let world = World::new().unwrap();
//! let gateway = world.gateway().start().unwrap();
//! let echo = world.serve(TARGET4, target::echo()).unwrap();
//! let done = world.exec(&gateway).run_app(&["duplex", &echo.addr().to_string(), "4096"]).unwrap();
//! assert!(done.success(), "{done}");
//! ```

pub mod admin;
pub mod amount;
pub mod bench;
pub mod bpf;
pub mod bpffs;
pub mod cgroup;
pub mod crowd;
pub mod daemon;
pub mod dialogue;
pub mod dmesg;
pub mod dns;
pub mod ends;
pub mod envoy;
pub mod exec;
pub mod frames;
pub mod gateway;
pub mod h3;
pub mod honest;
pub mod hop;
pub mod janitor;
pub mod leftovers;
pub mod link;
pub mod load;
pub mod modes;
pub mod mounts;
pub mod netns;
pub mod node;
pub mod pattern;
pub mod peer;
pub mod pki;
pub mod process;
pub mod programs;
pub mod providers;
pub mod proxies;
pub mod raw;
pub mod rules;
pub mod script;
pub mod servers;
pub mod sockets;
pub mod target;
pub mod terminal;
pub mod tun;
pub mod wait;
pub mod world;

pub use exec::{Exec, Finished, Running};
pub use gateway::Gateway;
pub use link::{Link, Profile};
pub use netns::NetNs;
pub use process::Process;
pub use target::Target;
pub use wait::{PATIENCE, stopped, wait_for};
pub use world::{BLACKHOLE, NET4, NET6, NODE4, NODE6, NOWHERE, TARGET4, TARGET6, World};
