//! What talks to the kernel beside sockets: bpf(2), cgroups, network namespaces, netlink, BTF, versions, privileges.

pub mod blockers;
pub mod bpf;
pub mod btf;
pub mod bypass;
pub mod cgroup;
pub mod confine;
pub mod firewall;
pub mod group;
pub mod helper;
pub mod inherited;
pub mod map;
pub mod mapped;
pub mod memory;
pub mod netlink;
pub mod netns;
pub mod own;
pub mod passed;
pub mod privileges;
pub mod ready;
pub mod sys;
pub mod version;
