//! Entry points, and nothing else: each calls a `try_` function and turns what it says into a verdict.
//!
//! Verdicts of cgroup hooks: 1 lets the system call go on, 0 makes it fail.

#![no_std]
#![no_main]

mod connect;
mod device;
mod field;
mod group;
mod maps;
mod original_dst;
mod tcp_events;

use aya_ebpf::{
    macros::{cgroup_sock_addr, cgroup_sockopt, sock_ops},
    programs::{SockAddrContext, SockOpsContext, SockoptContext},
};

/// `connect(2)` on IPv4 sockets.
#[cgroup_sock_addr(connect4)]
fn capture_connect4(ctx: SockAddrContext) -> i32 {
    connect::verdict(connect::try_connect4(&ctx))
}

/// `connect(2)` on IPv6 sockets, v4-mapped destinations included.
#[cgroup_sock_addr(connect6)]
fn capture_connect6(ctx: SockAddrContext) -> i32 {
    connect::verdict(connect::try_connect6(&ctx))
}

/// `getpeername(2)` on IPv4 sockets.
#[cgroup_sock_addr(getpeername4)]
fn peer_name4(ctx: SockAddrContext) -> i32 {
    original_dst::peer_name4(&ctx);
    1
}

/// `getpeername(2)` on IPv6 sockets.
#[cgroup_sock_addr(getpeername6)]
fn peer_name6(ctx: SockAddrContext) -> i32 {
    original_dst::peer_name6(&ctx);
    1
}

/// `getsockname(2)` on IPv4 sockets.
#[cgroup_sock_addr(getsockname4)]
fn sock_name4(ctx: SockAddrContext) -> i32 {
    original_dst::sock_name4(&ctx);
    1
}

/// `getsockname(2)` on IPv6 sockets.
#[cgroup_sock_addr(getsockname6)]
fn sock_name6(ctx: SockAddrContext) -> i32 {
    original_dst::sock_name6(&ctx);
    1
}

/// `getsockopt(2)`: `SO_ORIGINAL_DST` and `IP6T_SO_ORIGINAL_DST`.
#[cgroup_sockopt(getsockopt)]
fn original_dst(ctx: SockoptContext) -> i32 {
    original_dst::getsockopt(&ctx);
    1
}

/// `setsockopt(2)`: `SO_BINDTODEVICE` and `SO_BINDTOIFINDEX`.
#[cgroup_sockopt(setsockopt)]
fn stay_off_device(ctx: SockoptContext) -> i32 {
    device::setsockopt(&ctx);
    1
}

/// Connections of the cgroup, before their SYN and when they close.
#[sock_ops]
fn tcp_events(ctx: SockOpsContext) -> u32 {
    tcp_events::on_event(&ctx);
    1
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier accepts no program that can get here.
    loop {}
}

/// `bpf_sk_lookup_tcp` and the trie are for programs under a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
