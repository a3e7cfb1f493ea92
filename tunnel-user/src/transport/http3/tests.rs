//! Frames, settings, header sections and heads, as peers send them and as nobody should.

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, StatusCode};
use proptest::prelude::*;

use super::{
    frame::{self, Frames, Item, Kind, On},
    message::{self, HeadError},
    qpack::{self, DecodeError},
    *,
};

fn number(value: u64) -> Bytes {
    let mut out = BytesMut::new();
    varint::put(&mut out, value);
    out.freeze()
}

fn framed(kind: u64, payload: &[u8]) -> Vec<u8> {
    let mut out = BytesMut::new();
    frame::put_head(&mut out, Kind(kind), payload.len());
    out.extend_from_slice(payload);
    out.to_vec()
}

/// Everything in a stream, cut into pieces of `step`; DATA is joined.
fn read(on: On, bytes: &[u8], step: usize) -> Result<Vec<Item>, ProtocolError> {
    let (mut frames, mut items) = (Frames::new(on), Vec::new());
    for piece in bytes.chunks(step.max(1)) {
        frames.push(Bytes::copy_from_slice(piece));
        while let Some(item) = frames.item()? {
            match (items.last_mut(), item) {
                (Some(Item::Data(before)), Item::Data(more)) => {
                    *before = [&before[..], &more].concat().into();
                }
                (_, item) => items.push(item),
            }
        }
    }
    frames.end()?;
    Ok(items)
}

#[test]
fn integers_of_the_rfc_are_read_and_written() {
    // RFC 9000 appendix A.1.
    for (bytes, value) in [
        (&b"\xc2\x19\x7c\x5e\xff\x14\xe8\x8c"[..], 151_288_809_941_952_652),
        (b"\x9d\x7f\x3e\x7d", 494_878_333),
        (b"\x7b\xbd", 15_293),
        (b"\x25", 37),
    ] {
        assert_eq!(varint::get(bytes), Some((value, bytes.len())));
        assert_eq!(number(value), bytes);
        for cut in 0..bytes.len() {
            assert_eq!(varint::get(&bytes[..cut]), None);
        }
    }
    // Longer than it has to be.
    assert_eq!(varint::get(b"\x40\x25"), Some((37, 2)));
    assert_eq!(number(u64::MAX), number(varint::MAX));
}

#[test]
fn a_frame_that_does_not_belong_on_its_stream_is_an_error_before_its_payload() {
    let code = |on, kind| {
        let mut frames = Frames::new(on);
        frames.push(Bytes::from([&number(kind)[..], &number(1 << 40)[..]].concat()));
        frames.item().map(|_| ()).map_err(|e| e.code)
    };
    for kind in [0x02, 0x06, 0x08, 0x09, 0x05] {
        for on in [On::Request, On::Control] {
            assert_eq!(code(on, kind), Err(Code::FRAME_UNEXPECTED), "{on:?} {kind:#x}");
        }
    }
    for kind in [0x03, 0x04, 0x07, 0x0d] {
        assert_eq!(code(On::Request, kind), Err(Code::FRAME_UNEXPECTED), "{kind:#x}");
    }
    for kind in [0x00, 0x01] {
        assert_eq!(code(On::Control, kind), Err(Code::FRAME_UNEXPECTED), "{kind:#x}");
    }
    // Unknown, and of the kind that is there to be unknown.
    for kind in [0x21, 0x40, 0x0f_0700] {
        assert_eq!(code(On::Request, kind), Ok(()));
    }
}

#[test]
fn a_stream_that_ends_within_a_frame_is_an_error_and_a_frame_that_is_too_long_is_said() {
    let whole = [framed(0x01, b"abc"), framed(0x21, b"skipped"), framed(0x00, b"data")].concat();
    let items = [Item::Frame(Kind::HEADERS, Bytes::from("abc")), Item::Data(Bytes::from("data"))];
    assert_eq!(read(On::Request, &whole, 100).as_deref(), Ok(&items[..]));
    let ends = [0, 5, 14, 20];
    for cut in 0..=whole.len() {
        let cut_off = read(On::Request, &whole[..cut], 100).map_err(|e| e.code);
        // Where one frame has ended, or DATA has come to its end.
        assert_eq!(cut_off.is_ok(), ends.contains(&cut), "{cut}: {cut_off:?}");
        assert!(cut_off.is_ok() || cut_off == Err(Code::FRAME_ERROR));
    }
    let long = framed(0x01, &vec![0; HEADERS + 1]);
    assert_eq!(read(On::Request, &long, 7), Ok(vec![Item::TooLong(Kind::HEADERS)]));
    let long = framed(0x04, &vec![0; frame::CONTROL_MAX + 1]);
    assert_eq!(read(On::Control, &long, 7), Ok(vec![Item::TooLong(Kind::SETTINGS)]));
}

#[test]
fn settings_say_how_many_headers_are_taken_and_those_of_http_2_are_refused() {
    let mut out = BytesMut::new();
    settings::ours(&mut out);
    let items = read(On::Control, &out, 1).unwrap();
    let [Item::Frame(Kind::SETTINGS, payload)] = &items[..] else { panic!("{items:?}") };
    assert_eq!(settings::parse(payload.clone()).unwrap().max_field_section_size, HEADERS as u64);
    assert_eq!(settings::parse(Bytes::new()).unwrap().max_field_section_size, varint::MAX);
    let code = |bytes: &'static [u8]| settings::parse(Bytes::from_static(bytes)).map_err(|e| e.code);
    for id in [b"\x00\x00", b"\x02\x00", b"\x03\x00", b"\x04\x00", b"\x05\x00"] {
        assert_eq!(code(id), Err(Code::SETTINGS_ERROR));
    }
    assert_eq!(code(b"\x21\x00\x21\x00"), Err(Code::SETTINGS_ERROR));
    assert_eq!(code(b"\x06"), Err(Code::FRAME_ERROR));
    assert_eq!(code(b"\x06\x40"), Err(Code::FRAME_ERROR));
    // What is not known is let be: of QPACK, of extended CONNECT, of datagrams.
    assert!(code(b"\x01\x40\x40\x07\x08\x08\x01\x33\x01").is_ok());
}

#[test]
fn sections_of_the_rfc_are_read() {
    // RFC 9204 appendix B.1: a name of the table, and a literal value.
    let section = b"\x00\x00\x51\x0b/index.html";
    assert_eq!(qpack::decode(section, HEADERS), Ok(vec![(":path".into(), "/index.html".into())]));
    // A name and a value that are coded.
    let section = b"\x00\x00\x2f\x01\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x86\xa8\xeb\x10\x64\x9c\xbf";
    // The length of the name is 7 + 1: eight bytes are not a whole string of this code.
    assert!(matches!(qpack::decode(section, HEADERS), Err(DecodeError::Malformed(_))));
    let section =
        b"\x00\x00\x2f\x05\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff\x86\xa8\xeb\x10\x64\x9c\xbf";
    let fields = vec![("www.example.com".into(), "no-cache".into())];
    assert_eq!(qpack::decode(section, HEADERS), Ok(fields));
}

#[test]
fn sections_that_need_the_dynamic_table_or_are_cut_are_refused() {
    for section in [
        &b""[..],
        b"\x00",
        b"\x01\x00",
        b"\x00\x80",
        // Indexed, a name of, and behind the base.
        b"\x00\x00\x80",
        b"\x00\x00\x40\x01x",
        b"\x00\x00\x10",
        b"\x00\x00\x00\x01x",
        // Beyond the static table; and cut.
        b"\x00\x00\xff\x24",
        b"\x00\x00\xff",
        b"\x00\x00\x51\x0b/index",
        b"\x00\x00\x27",
        // An integer without an end.
        b"\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    ] {
        let decoded = qpack::decode(section, HEADERS);
        let refused =
            matches!(&decoded, Err(DecodeError::Malformed(e)) if e.code == Code::QPACK_DECOMPRESSION_FAILED);
        assert!(refused, "{section:x?}: {decoded:?}");
    }
}

#[test]
fn a_section_with_more_bytes_than_are_taken_is_too_long_however_short_it_is() {
    // "content-security-policy" and its value are 76 bytes, and one here.
    let section = [&b"\x00\x00"[..], &b"\xff\x16".repeat(200)].concat();
    assert_eq!(qpack::decode(&section, HEADERS), Err(DecodeError::TooLong));
    let value = vec![b'x'; HEADERS];
    let section = qpack::encode([("x", &value[..])]);
    assert_eq!(qpack::decode(&section, HEADERS), Err(DecodeError::TooLong));
}

#[test]
fn a_connect_request_and_its_answer_are_what_was_encoded() {
    let mut headers = HeaderMap::new();
    headers.insert("baggage", HeaderValue::from_static("x=y"));
    let request = message::decode_request(&message::encode_connect("a.example:1", &headers)).unwrap();
    assert_eq!((request.method.as_str(), request.authority.as_str()), ("CONNECT", "a.example:1"));
    assert_eq!(request.headers, headers);
    for status in [StatusCode::OK, StatusCode::BAD_GATEWAY] {
        let response = message::decode_response(&message::encode_response(status, &headers)).unwrap();
        assert_eq!((response.status, response.headers), (status, headers.clone()));
    }
}

#[test]
fn heads_that_could_be_read_in_two_ways_are_malformed() {
    let connect = [(":method", "CONNECT"), (":authority", "a:1")];
    let get = [(":method", "GET"), (":scheme", "https"), (":authority", "a"), (":path", "/")];
    let decode = |fields: &[(&str, &str)]| {
        message::decode_request(&qpack::encode(fields.iter().map(|(n, v)| (*n, v.as_bytes()))))
    };
    assert!(decode(&connect).is_ok() && decode(&get).is_ok());
    for more in [
        (":authority", "a:2"),
        (":scheme", "https"),
        (":path", "/"),
        (":protocol", "connect-udp"),
        (":status", "200"),
        (":new", "x"),
        ("Upper", "x"),
        ("a b", "x"),
        ("x", "a\nb"),
        ("connection", "close"),
        ("transfer-encoding", "chunked"),
        ("proxy-connection", "keep-alive"),
        ("te", "gzip"),
    ] {
        let malformed = matches!(decode(&[&connect[..], &[more]].concat()), Err(HeadError::Malformed(_)));
        assert!(malformed, "{more:?}");
    }
    assert!(decode(&[&connect[..], &[("te", "trailers")]].concat()).is_ok());
    for fields in [&connect[..1], &connect[1..], &get[..3], &[("x", "y"), connect[0], connect[1]][..]] {
        assert!(matches!(decode(fields), Err(HeadError::Malformed(_))), "{fields:?}");
    }
    let answer = |fields: &[(&str, &str)]| {
        message::decode_response(&qpack::encode(fields.iter().map(|(n, v)| (*n, v.as_bytes()))))
    };
    assert!(answer(&[(":status", "200")]).is_ok());
    for fields in [
        &[][..],
        &[(":status", "99")],
        &[(":status", "2000")],
        &connect,
        &[(":status", "200"), (":path", "/")],
    ] {
        assert!(matches!(answer(fields), Err(HeadError::Malformed(_))), "{fields:?}");
    }
}

proptest! {
    #[test]
    fn an_integer_is_what_was_written(value in 0..=varint::MAX) {
        let bytes = number(value);
        prop_assert_eq!(varint::get(&bytes), Some((value, bytes.len())));
        prop_assert_eq!(varint::only(&bytes), Some(value));
    }

    #[test]
    fn frames_are_the_same_however_they_are_cut(
        stream in proptest::collection::vec(any::<u8>(), 0..200),
        sizes in proptest::collection::vec(0_usize..50, 1..6),
        step in 1_usize..30,
    ) {
        let good = sizes.iter().enumerate().map(|(i, n)| framed([0, 1, 0x21][i % 3], &vec![7; *n]));
        for bytes in [stream, good.flatten().collect()] {
            for on in [On::Request, On::Control] {
                prop_assert_eq!(read(on, &bytes, step), read(on, &bytes, usize::MAX));
            }
        }
    }

    #[test]
    fn fields_are_what_was_encoded(
        fields in proptest::collection::vec(("[a-z-]{1,12}", proptest::collection::vec(any::<u8>(), 0..20)), 0..12),
    ) {
        let section = qpack::encode(fields.iter().map(|(name, value)| (name.as_str(), &value[..])));
        let decoded = qpack::decode(&section, HEADERS).unwrap();
        let wanted: Vec<_> = fields.into_iter().map(|(n, v)| (Bytes::from(n), Bytes::from(v))).collect();
        prop_assert_eq!(decoded, wanted);
    }

    #[test]
    fn arbitrary_bytes_are_a_head_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _request = message::decode_request(&bytes);
        let _response = message::decode_response(&bytes);
        let _settings = settings::parse(Bytes::from(bytes));
    }
}
