//! What source address a route gives: for `getsockname` of captured sockets, which have one of loopback.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aya::maps::{LpmTrie, Map, MapData, lpm_trie::Key};
use ipnet::IpNet;
use tunnel_common::{
    capture::{SOURCE_NETNS_BITS, SourceV4, SourceV6},
    names,
};

use super::bpf::map;
use crate::kernel::bpf::BpfError;

/// The programs' tries.
pub(super) struct Sources {
    v4: LpmTrie<MapData, SourceV4, u32>,
    v6: LpmTrie<MapData, SourceV6, [u32; 4]>,
}

impl Sources {
    pub(super) fn new(v4: Map, v6: Map) -> Result<Self, BpfError> {
        Ok(Self {
            v4: LpmTrie::try_from(v4).map_err(map(names::SOURCES_V4))?,
            v6: LpmTrie::try_from(v6).map_err(map(names::SOURCES_V6))?,
        })
    }

    /// Replaces what is known of a namespace. What is the same stays while it does.
    pub(super) fn set(&mut self, netns: u64, sources: &[(IpNet, IpAddr)]) -> Result<(), BpfError> {
        let v4: Vec<_> = sources.iter().filter_map(|s| of_v4(netns, s)).collect();
        let v6: Vec<_> = sources.iter().filter_map(|s| of_v6(netns, s)).collect();
        for (key, source) in &v4 {
            self.v4.insert(key, *source, 0).map_err(map(names::SOURCES_V4))?;
        }
        for (key, source) in &v6 {
            self.v6.insert(key, *source, 0).map_err(map(names::SOURCES_V6))?;
        }
        let same =
            |a: &Key<SourceV4>, b: &Key<SourceV4>| a.prefix_len() == b.prefix_len() && a.data() == b.data();
        let gone: Vec<_> = self.v4.keys().filter_map(Result::ok).filter(|k| k.data().is_in(netns)).collect();
        for key in gone.iter().filter(|key| !v4.iter().any(|(kept, _)| same(kept, key))) {
            self.v4.remove(key).map_err(map(names::SOURCES_V4))?;
        }
        let same =
            |a: &Key<SourceV6>, b: &Key<SourceV6>| a.prefix_len() == b.prefix_len() && a.data() == b.data();
        let gone: Vec<_> = self.v6.keys().filter_map(Result::ok).filter(|k| k.data().is_in(netns)).collect();
        for key in gone.iter().filter(|key| !v6.iter().any(|(kept, _)| same(kept, key))) {
            self.v6.remove(key).map_err(map(names::SOURCES_V6))?;
        }
        Ok(())
    }
}

fn of_v4(netns: u64, (net, source): &(IpNet, IpAddr)) -> Option<(Key<SourceV4>, u32)> {
    let (IpNet::V4(net), IpAddr::V4(source)) = (net, source) else { return None };
    let key = SourceV4::new(netns, net.network().to_bits().to_be());
    Some((Key::new(SOURCE_NETNS_BITS + u32::from(net.prefix_len()), key), Ipv4Addr::to_bits(*source).to_be()))
}

fn of_v6(netns: u64, (net, source): &(IpNet, IpAddr)) -> Option<(Key<SourceV6>, [u32; 4])> {
    let (IpNet::V6(net), IpAddr::V6(source)) = (net, source) else { return None };
    let key = SourceV6::new(netns, words(net.network()));
    Some((Key::new(SOURCE_NETNS_BITS + u32::from(net.prefix_len()), key), words(*source)))
}

/// In network order, as the programs have them.
fn words(ip: Ipv6Addr) -> [u32; 4] {
    tunnel_common::addr::Endpoint::from(std::net::SocketAddr::from((ip, 0))).v6_be()
}
