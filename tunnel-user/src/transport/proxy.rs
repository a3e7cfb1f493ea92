//! The PROXY protocol, versions 1 and 2 (haproxy's doc/proxy-protocol.txt): reads the client's address from the start of a
//! connection, and writes a header of version 2.
//!
//! # Invariants
//! - A header is complete before it is used, and no longer than [`V1_MAX`] or [`V2_MAX`]; what follows it is not consumed.
//! - An identity in a header is ignored.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use tokio::{io::AsyncReadExt as _, net::TcpStream};

use super::io::peek_until;
use crate::model::flow::{ClientAddr, Identity};

/// The longest header of version 1, its end included (section 2.1).
pub const V1_MAX: usize = 107;
/// The longest header of version 2 that is read. What we write ourselves is the longest that we know of, 2.4 KiB with
/// a SPIFFE ID of 2,048 bytes (SPIFFE ID section 2.3); balancers of the clouds write a few hundred.
pub const V2_MAX: usize = 4096;
/// What the first word of version 1 is.
const V1: &[u8] = b"PROXY ";
/// What version 2 begins with (section 2.2).
const V2: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// The signature, version and command, family and protocol, length.
const V2_FIXED: usize = 16;
/// Version 2, and the balancer's own connection: the socket's addresses are right.
const LOCAL: u8 = 0x20;
/// Version 2, on behalf of another.
const PROXY: u8 = 0x21;
/// TCP over IPv4, and its addresses and ports.
const TCP4: u8 = 0x11;
const TCP4_LENGTH: usize = 12;
/// TCP over IPv6, and its addresses and ports.
const TCP6: u8 = 0x21;
const TCP6_LENGTH: usize = 36;
/// The name that was asked for (section 2.2.2).
const TLV_AUTHORITY: u8 = 0x02;
/// Who the client has proved to be: a SPIFFE ID, DNS name or address, as text. Of the range that is left to
/// applications (PP2_TYPE_MIN_CUSTOM to PP2_TYPE_MAX_CUSTOM, section 2.2.8), without those that clouds use (0xE0,
/// 0xEA, 0xEE).
pub const TLV_IDENTITY: u8 = 0xE5;

/// Why what came is no header. The sender's fault, or the operator's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// It begins with something else.
    #[error("no PROXY header")]
    Missing,
    /// It begins like one.
    #[error("malformed PROXY header: {0}")]
    Syntax(&'static str),
    /// It has not ended where it had to.
    #[error("PROXY header longer than {0} bytes")]
    TooLong(usize),
}

/// Why there is no header.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// What came is none.
    #[error("{0}")]
    Header(#[from] HeaderError),
    /// The connection ended, or broke, before it was whole.
    #[error("{0} before the PROXY header was complete")]
    Io(#[from] io::Error),
}

/// Reads the header in front of a connection, and not a byte more; the client's address, unless the header leaves that
/// to the socket. The caller bounds the time.
pub async fn read(stream: &mut TcpStream) -> Result<Option<ClientAddr>, ReadError> {
    let mut start = vec![0; V2_MAX];
    let (client, length) = peek_until(stream, &mut start, |bytes| parse(bytes).transpose()).await??;
    stream.read_exact(&mut start[..length]).await?;
    Ok(client)
}

/// Parses the header at the front of `bytes`: the client's address, unless it is left to the socket, and the header's
/// length. Nothing while it is not whole.
pub fn parse(bytes: &[u8]) -> Result<Option<(Option<ClientAddr>, usize)>, HeaderError> {
    let begins = |with: &[u8]| bytes.iter().zip(with).all(|(is, wanted)| is == wanted);
    if begins(V2) {
        parse_v2(bytes)
    } else if begins(V1) {
        parse_v1(bytes)
    } else {
        Err(HeaderError::Missing)
    }
}

fn parse_v1(bytes: &[u8]) -> Result<Option<(Option<ClientAddr>, usize)>, HeaderError> {
    let window = &bytes[..bytes.len().min(V1_MAX)];
    let Some(end) = window.windows(2).position(|pair| pair == b"\r\n") else {
        return if bytes.len() < V1_MAX { Ok(None) } else { Err(HeaderError::TooLong(V1_MAX)) };
    };
    let line = str::from_utf8(&window[..end]).map_err(|_| HeaderError::Syntax("it is not ASCII"))?;
    let mut words = line.split(' ').skip(1);
    let mut word = || words.next().ok_or(HeaderError::Syntax("it is too short"));
    let family = word()?;
    if family == "UNKNOWN" {
        // What else it says is to be ignored.
        return Ok(Some((None, end + 2)));
    }
    let (from, to) = (word()?, word()?);
    let addresses: Result<(IpAddr, IpAddr), _> = match family {
        "TCP4" => from.parse().and_then(|a: Ipv4Addr| Ok((a.into(), to.parse::<Ipv4Addr>()?.into()))),
        "TCP6" => from.parse().and_then(|a: Ipv6Addr| Ok((a.into(), to.parse::<Ipv6Addr>()?.into()))),
        _ => return Err(HeaderError::Syntax("its family is neither TCP4 nor TCP6 nor UNKNOWN")),
    };
    let (from, _to) = addresses.map_err(|_| HeaderError::Syntax("it has a wrong address"))?;
    let (from_port, _to_port) = (port(word()?)?, port(word()?)?);
    if words.next().is_some() {
        return Err(HeaderError::Syntax("it is too long"));
    }
    Ok(Some((Some(ClientAddr(SocketAddr::new(from, from_port))), end + 2)))
}

/// Digits, without zeros in front.
fn port(text: &str) -> Result<u16, HeaderError> {
    let plain = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    text.parse().ok().filter(|_| plain).ok_or(HeaderError::Syntax("it has a wrong port"))
}

fn parse_v2(bytes: &[u8]) -> Result<Option<(Option<ClientAddr>, usize)>, HeaderError> {
    let Some(fixed) = bytes.get(..V2_FIXED) else { return Ok(None) };
    let (command, family) = (fixed[12], fixed[13]);
    let length = V2_FIXED + usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    if length > V2_MAX {
        return Err(HeaderError::TooLong(V2_MAX));
    }
    let Some(block) = bytes.get(V2_FIXED..length) else { return Ok(None) };
    let client = match (command, family) {
        (LOCAL, _) => None,
        (PROXY, TCP4) => {
            let [a, b, c, d, _, _, _, _, high, low, _, _] = *fixed_part::<TCP4_LENGTH>(block)?;
            Some(SocketAddr::from(([a, b, c, d], u16::from_be_bytes([high, low]))))
        }
        (PROXY, TCP6) => {
            let block = fixed_part::<TCP6_LENGTH>(block)?;
            let (from, rest) = block.split_first_chunk::<16>().ok_or(SHORT)?;
            Some(SocketAddr::from((*from, u16::from_be_bytes([rest[16], rest[17]]))))
        }
        // Datagrams, sockets without addresses, or none: they are not what came here.
        (PROXY, 0x00 | 0x12 | 0x22 | 0x31 | 0x32) => None,
        (PROXY, _) => return Err(HeaderError::Syntax("its family is none")),
        _ => return Err(HeaderError::Syntax("its version or command is none")),
    };
    Ok(Some((client.map(ClientAddr), length)))
}

const SHORT: HeaderError = HeaderError::Syntax("it is too short");

/// The addresses; what else it says stands behind them.
fn fixed_part<const N: usize>(block: &[u8]) -> Result<&[u8; N], HeaderError> {
    block.first_chunk().ok_or(SHORT)
}

/// What is said in front of a connection that we make for somebody else.
#[derive(Clone, Copy, Debug)]
pub struct Header<'a> {
    /// Who opened the flow.
    pub client: ClientAddr,
    /// Where it wanted to go.
    pub destination: SocketAddr,
    /// The name that it wanted to go to.
    pub name: Option<&'a str>,
    /// Who its client has proved to be.
    pub identity: Option<&'a Identity>,
}

impl Header<'_> {
    /// The header in version 2.
    pub fn encode(&self) -> Bytes {
        let (from, to) = (self.client.0, self.destination);
        let mut block = BytesMut::new();
        let family = match (from.ip().to_canonical(), to.ip().to_canonical()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                block.put_slice(&from.octets());
                block.put_slice(&to.octets());
                TCP4
            }
            // One of either: both are written as IPv6.
            (from, to) => {
                block.put_slice(&as_v6(from).octets());
                block.put_slice(&as_v6(to).octets());
                TCP6
            }
        };
        block.put_u16(from.port());
        block.put_u16(to.port());
        let name = self.name.map(|name| (TLV_AUTHORITY, name));
        let identity = self.identity.map(|who| (TLV_IDENTITY, &*who.0));
        for (kind, value) in name.into_iter().chain(identity) {
            // The lengths have two bytes. A handshake, and so every name in a certificate, is shorter.
            if let Ok(length) = u16::try_from(value.len())
                && block.len() + 3 + value.len() <= usize::from(u16::MAX)
            {
                block.put_u8(kind);
                block.put_u16(length);
                block.put_slice(value.as_bytes());
            }
        }
        let mut header = BytesMut::with_capacity(V2_FIXED + block.len());
        header.put_slice(V2);
        header.put_u8(PROXY);
        header.put_u8(family);
        header.put_u16(u16::try_from(block.len()).unwrap_or(u16::MAX));
        header.put_slice(&block);
        header.freeze()
    }
}

fn as_v6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::{io::AsyncWriteExt as _, net::TcpListener};

    use super::*;

    fn client(text: &str) -> Option<ClientAddr> {
        Some(ClientAddr(text.parse().unwrap()))
    }

    fn v2(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
        let length = u16::try_from(block.len()).unwrap().to_be_bytes();
        [&V2[..], &[command, family], &length, block].concat()
    }

    #[test]
    fn what_balancers_write_is_read() {
        for (line, wanted) in [
            ("PROXY TCP4 192.0.2.1 10.0.0.1 56324 443\r\n", client("192.0.2.1:56324")),
            ("PROXY TCP6 2001:db8::1 2001:db8::2 1 65535\r\n", client("[2001:db8::1]:1")),
            ("PROXY TCP4 192.0.2.1 10.0.0.1 0 0\r\n", client("192.0.2.1:0")),
            ("PROXY UNKNOWN\r\n", None),
            ("PROXY UNKNOWN ffff::1 whatever\r\n", None),
        ] {
            assert_eq!(parse(line.as_bytes()), Ok(Some((wanted, line.len()))), "{line:?}");
        }
        let v4 = [192, 0, 2, 1, 10, 0, 0, 1, 0xdc, 4, 1, 0xbb];
        let v6: Vec<u8> = [Ipv6Addr::LOCALHOST.octets(), [1; 16]].concat();
        let v6 = [&v6[..], &[0, 9, 0, 10]].concat();
        let tlv = [&v4[..], &[4, 0, 1, 0]].concat();
        for (bytes, wanted) in [
            (v2(PROXY, TCP4, &v4), client("192.0.2.1:56324")),
            (v2(PROXY, TCP4, &tlv), client("192.0.2.1:56324")),
            (v2(PROXY, TCP6, &v6), client("[::1]:9")),
            (v2(LOCAL, TCP4, &v4), None),
            (v2(LOCAL, 0, &[]), None),
            (v2(PROXY, 0, &[]), None),
            (v2(PROXY, 0x31, &[0; 216]), None),
        ] {
            assert_eq!(parse(&bytes), Ok(Some((wanted, bytes.len()))), "{bytes:?}");
            assert_eq!(parse(&[&bytes[..], b"\x16\x03"].concat()), Ok(Some((wanted, bytes.len()))));
        }
    }

    #[test]
    fn what_is_no_header_is_refused_and_says_why() {
        for line in [
            "PROXY TCP4 192.0.2.1 10.0.0.1 56324\r\n",
            "PROXY TCP4 192.0.2.1 10.0.0.1 56324 443 1\r\n",
            "PROXY TCP4 2001:db8::1 2001:db8::2 1 2\r\n",
            "PROXY TCP6 192.0.2.1 10.0.0.1 1 2\r\n",
            "PROXY TCP4 192.0.2.01 10.0.0.1 1 2\r\n",
            "PROXY TCP4 192.0.2.1 10.0.0.1 01 2\r\n",
            "PROXY TCP4 192.0.2.1 10.0.0.1 +1 2\r\n",
            "PROXY TCP4 192.0.2.1 10.0.0.1 1 65536\r\n",
            "PROXY TCP4  192.0.2.1 10.0.0.1 1 2\r\n",
            "PROXY UDP4 192.0.2.1 10.0.0.1 1 2\r\n",
            "PROXY \r\n",
            "PROXY TCP4 \u{e9} 10.0.0.1 1 2\r\n",
        ] {
            assert!(matches!(parse(line.as_bytes()), Err(HeaderError::Syntax(_))), "{line:?}");
        }
        for other in
            ["GET / HTTP/1.1\r\n", "proxy TCP4 ", "PROXX", "\u{16}\u{3}\u{1}", "\r\n\r\n\r", "PRI * "]
        {
            assert_eq!(parse(other.as_bytes()), Err(HeaderError::Missing), "{other:?}");
        }
        assert_eq!(parse(&[V1, &[b'x'; V1_MAX]].concat()), Err(HeaderError::TooLong(V1_MAX)));
        let long = [&V2[..], &[PROXY, TCP4, 0xff, 0xff]].concat();
        assert_eq!(parse(&long), Err(HeaderError::TooLong(V2_MAX)));
        for (command, family, block) in [
            (PROXY, TCP4, &[0; 11][..]),
            (PROXY, TCP6, &[0; 35]),
            (PROXY, 0x41, &[0; 36]),
            (PROXY, 0x10, &[0; 36]),
            (0x22, TCP4, &[0; 12]),
            (0x11, TCP4, &[0; 12]),
        ] {
            let said = parse(&v2(command, family, block));
            assert!(matches!(said, Err(HeaderError::Syntax(_))), "{command} {family} {said:?}");
        }
    }

    #[test]
    fn what_we_write_says_who_where_to_and_by_what_name() {
        let identity = Identity("spiffe://example.org/web".into());
        let header = Header {
            client: ClientAddr("[2001:db8::7]:40000".parse().unwrap()),
            destination: "10.0.0.1:443".parse().unwrap(),
            name: Some("web.internal"),
            identity: Some(&identity),
        };
        let bytes = header.encode();
        assert_eq!(parse(&bytes), Ok(Some((Some(header.client), bytes.len()))));
        let tlvs = [
            &[TLV_AUTHORITY, 0, 12][..],
            b"web.internal",
            &[TLV_IDENTITY, 0, 24],
            b"spiffe://example.org/web",
        ]
        .concat();
        assert!(bytes.ends_with(&tlvs));
        assert_eq!(bytes[V2_FIXED + 16..V2_FIXED + 32], Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped().octets());
        // As long as it gets, it is read by ourselves.
        let longest = Identity("s".repeat(2048).into());
        let name = "n".repeat(253);
        let longest = Header { name: Some(&name), identity: Some(&longest), ..header }.encode();
        assert!(longest.len() <= V2_MAX && parse(&longest).unwrap().is_some());
        // A name that no certificate can hold is left out; the header stays right.
        let absurd = Identity("s".repeat(70_000).into());
        let absurd = Header { identity: Some(&absurd), ..header }.encode();
        assert_eq!(parse(&absurd), Ok(Some((Some(header.client), absurd.len()))));
    }

    #[tokio::test]
    async fn not_a_byte_behind_the_header_is_taken_however_it_comes() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        sender.set_nodelay(true).unwrap();
        let (mut stream, _) = listener.accept().await.unwrap();
        let dripped = async {
            for byte in b"PROXY TCP4 192.0.2.1 10.0.0.1 1 2\r\nbehind" {
                sender.write_all(&[*byte]).await.unwrap();
                tokio::task::yield_now().await;
            }
        };
        let (from, ()) = tokio::join!(read(&mut stream), dripped);
        assert_eq!(from.unwrap(), client("192.0.2.1:1"));
        let mut behind = [0; 6];
        stream.read_exact(&mut behind).await.unwrap();
        assert_eq!(&behind, b"behind");

        sender.write_all(b"PROXY TCP4").await.unwrap();
        sender.shutdown().await.unwrap();
        let cut = read(&mut stream).await.unwrap_err();
        assert!(matches!(cut, ReadError::Io(e) if e.kind() == io::ErrorKind::UnexpectedEof));
    }

    fn addr() -> impl Strategy<Value = SocketAddr> {
        prop_oneof![
            any::<([u8; 4], u16)>().prop_map(Into::into),
            any::<([u8; 16], u16)>().prop_map(Into::into)
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0usize..3) {
            let start = [&[][..], V1, V2][kind];
            let _verdict = parse(&[start, &bytes].concat());
        }

        #[test]
        fn a_header_that_is_cut_is_not_whole_and_what_is_behind_it_is_not_of_it(
            from in addr(), to in addr(), name in prop::option::of("[a-z]{1,20}"),
            behind in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let header = Header { client: ClientAddr(from), destination: to, name: name.as_deref(), identity: None };
            let encoded = header.encode();
            let all = [&encoded[..], &behind].concat();
            for cut in 0..encoded.len() {
                prop_assert_eq!(parse(&all[..cut]), Ok(None));
            }
            let (client, length) = parse(&all).unwrap().unwrap();
            prop_assert_eq!(length, encoded.len());
            prop_assert_eq!(client.unwrap().0.ip().to_canonical(), from.ip().to_canonical());
            prop_assert_eq!(client.unwrap().0.port(), from.port());
        }
    }
}
