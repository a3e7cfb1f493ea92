//! Joins two sockets of the daemon in the kernel: what one receives, the other sends. Entry points only.

#![no_std]
#![no_main]

use aya_ebpf::{bindings::sk_action::SK_PASS, macros::stream_verdict, programs::SkBuffContext};

/// What becomes of what a socket has received.
#[stream_verdict]
fn splice_verdict(_ctx: SkBuffContext) -> u32 {
    SK_PASS
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier accepts no program that can get here.
    loop {}
}

/// `bpf_sk_redirect_hash` is for programs under a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
