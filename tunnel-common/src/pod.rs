//! `aya::Pod` for the types that cross into maps, with their sizes.

use aya::Pod;

use crate::{
    addr::Endpoint,
    capture::{Listener, Missing, PortRange, Rule, SocketKey, SourceV4, SourceV6},
    fastpath::{
        bypass::{Offsets, Slot, Tag},
        splice,
    },
    flow::{FlowKey, Origin},
    group,
};

macro_rules! pod {
    ($($t:ty = $size:literal),* $(,)?) => {$(
        const _: () = assert!(size_of::<$t>() == $size);
        // SAFETY: `repr(C)`, made of integers and byte arrays only, without padding (the size above is
        // the sum of the fields), so every byte is initialised and every bit pattern is a valid value.
        unsafe impl Pod for $t {}
    )*};
}

pod! {
    Endpoint = 20,
    FlowKey = 48,
    Origin = 48,
    PortRange = 4,
    Rule = 68,
    Listener = 12,
    SocketKey = 16,
    Missing = 24,
    SourceV4 = 12,
    SourceV6 = 24,
    group::Name = 256,
    group::Offsets = 24,
    group::Place = 16,
    splice::Words = 128,
    splice::Offsets = 32,
    Offsets = 60,
    Slot = 120,
    Tag = 16,
}
