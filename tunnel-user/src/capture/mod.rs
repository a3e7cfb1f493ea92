//! Source 1: connections that the kernel programs redirect to us.

pub mod bpf;
pub mod rules;
pub mod sys;
