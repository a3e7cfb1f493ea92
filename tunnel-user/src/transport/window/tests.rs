use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

/// A peer that has more to send than any window lets it, over a link with a rate and a delay, and a PING that
/// queues behind what it has sent.
struct Link {
    /// Bytes per second.
    rate: f64,
    trip: Duration,
    streams: u32,
}

struct Run {
    windows: Windows,
    largest: u32,
    smallest: u32,
}

impl Link {
    fn product(&self) -> f64 {
        self.rate * self.trip.as_secs_f64()
    }

    /// For so many round trips, with what is held by readers that do not read.
    #[expect(clippy::cast_possible_truncation, reason = "bytes of a few round trips")]
    fn run(&self, trips: u32, held: impl Fn(u32) -> u64) -> Run {
        const TICKS: u32 = 64;
        let (tick, half) = (self.trip / TICKS, self.trip / 2);
        let start = Instant::now();
        let mut run = Run { windows: Windows::default(), largest: WINDOW_START, smallest: WINDOW_START };
        let (mut received, mut queued, mut window) = (0u64, 0.0f64, u64::from(WINDOW_START));
        let mut under_way = 0.0f64;
        // When, and what: bytes that arrive, room that the peer hears of, windows, the answer to a PING.
        let (mut arriving, mut room) = (VecDeque::new(), VecDeque::new());
        let mut told: VecDeque<(Instant, u32)> = VecDeque::new();
        let (mut ping, mut pong) = (None, None);
        for step in 0..trips * TICKS {
            let now = start + tick * step;
            while told.front().is_some_and(|(at, _)| *at <= now) {
                window = told.pop_front().map_or(window, |(_, new)| u64::from(new));
            }
            while room.front().is_some_and(|(at, _)| *at <= now) {
                under_way -= room.pop_front().map_or(0.0, |(_, n): (Instant, f64)| n);
            }
            // The first PING finds the link empty.
            let all = if step < 2 * TICKS { 0 } else { window * u64::from(self.streams) };
            let sends = (all as f64 - under_way).max(0.0);
            under_way += sends;
            queued += sends;
            if ping.is_some_and(|at| at <= now) {
                ping = None;
                pong = Some(now + Duration::from_secs_f64(queued / self.rate) + half);
            }
            let leaves = queued.min(self.rate * tick.as_secs_f64());
            queued -= leaves;
            arriving.push_back((now + half, leaves));
            while arriving.front().is_some_and(|(at, _)| *at <= now) {
                let n = arriving.pop_front().map_or(0.0, |(_, n): (Instant, f64)| n);
                received += n as u64;
                room.push_back((now + half, n));
            }
            if pong.is_some_and(|at| at <= now) {
                pong = None;
                run.windows.answered(received, now);
            }
            if run.windows.wants_ping(received, now) {
                run.windows.asked(received, now);
                ping = Some(now + half);
            }
            if let Some(new) = run.windows.change(held(step / TICKS), false) {
                run.windows.told(new);
                told.push_back((now + half, new));
            }
            run.largest = run.largest.max(run.windows.announced());
            run.smallest = run.smallest.min(run.windows.announced());
        }
        run
    }
}

fn nothing(_: u32) -> u64 {
    0
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_window_is_within_its_bounds_whatever_the_link_and_the_readers_do(
        megabits in 1u32..20_000,
        micros in 50u64..200_000,
        streams in 1u32..100,
        held in proptest::collection::vec(0u64..200 << 20, 30),
    ) {
        let link = Link {
            rate: f64::from(megabits) * 125_000.0,
            trip: Duration::from_micros(micros),
            streams,
        };
        let run = link.run(30, |trip| held[trip as usize]);
        prop_assert!(run.largest <= WINDOW_MAX && run.smallest >= WINDOW_MIN);
        let run = link.run(30, nothing);
        prop_assert!(run.largest <= WINDOW_MAX && run.smallest == WINDOW_START);
    }

    #[test]
    fn one_stream_gets_twice_bandwidth_times_delay_in_a_few_round_trips(
        megabits in 50u32..3_000,
        millis in 2u64..200,
    ) {
        let link = Link {
            rate: f64::from(megabits) * 125_000.0,
            trip: Duration::from_millis(millis),
            streams: 1,
        };
        // Two for each of the four times that it can double, and some for what is not seen at once; over a short
        // trip it is the time between two PINGs that counts.
        let run = link.run(24 + 400 / u32::try_from(millis).unwrap(), nothing);
        let wanted = (2.0 * link.product()).min(f64::from(WINDOW_MAX));
        let got = f64::from(run.windows.announced());
        prop_assert!(got >= 0.95 * wanted, "{got} for a product of {}", link.product());
        // And not much more than there is use for.
        prop_assert!(got <= f64::from(WINDOW_START).max(4.4 * link.product()), "{got}, {}", link.product());
    }

    #[test]
    fn over_a_short_round_trip_it_stays_as_it_is(
        megabits in 100u32..40_000,
        micros in 20u64..900,
        streams in 1u32..100,
    ) {
        let link = Link {
            rate: f64::from(megabits) * 125_000.0,
            trip: Duration::from_micros(micros),
            streams,
        };
        let run = link.run(200, nothing);
        prop_assert_eq!((run.smallest, run.largest), (WINDOW_START, WINDOW_START));
    }

    #[test]
    fn what_the_streams_of_a_connection_hold_leaves_each_of_the_others_the_least_window(
        streams in 1u32..400,
    ) {
        // One after the other they are stuck, each with the window that it has at that time.
        let (mut windows, mut held) = (Windows::default(), 0u64);
        windows.wanted = WINDOW_MAX;
        for _ in 0..streams {
            if let Some(new) = windows.change(held, false) {
                windows.told(new);
            }
            let left = u64::from(connection_window(streams)) - held;
            prop_assert!(left >= u64::from(windows.announced()), "{left} left, with {held} held");
            held += u64::from(windows.announced());
        }
        prop_assert!(held <= u64::from(connection_window(streams)));
    }
}

#[test]
fn windows_that_shrank_grow_again_when_there_is_room_and_not_at_once() {
    let mut windows = Windows { announced: WINDOW_MAX, wanted: WINDOW_MAX, ..Windows::default() };
    let held = u64::from(HELD_MAX);
    assert_eq!(windows.change(held / 2, false), None);
    assert_eq!(windows.change(held, false), Some(WINDOW_MIN));
    windows.told(WINDOW_MIN);
    assert_eq!(windows.change(held * 3 / 4, false), None, "what is held has to be half of what it was");
    assert_eq!(windows.change(held * 3 / 8, false), Some(WINDOW_MAX));
}

#[test]
fn nothing_is_asked_while_nothing_flows_and_a_quiet_link_is_asked_once_a_second() {
    let (mut windows, start) = (Windows::default(), Instant::now());
    assert!(windows.wants_ping(0, start), "the first");
    windows.asked(0, start);
    windows.answered(0, start + Duration::from_millis(30));
    assert!(!windows.wants_ping(0, start + Duration::from_secs(60)));
    // Ten seconds of 80 Mbit/s over 30 ms.
    let (mut received, mut pings, mut answer) = (0, 0, None);
    for millis in 0..10_000 {
        let now = start + Duration::from_millis(30 + millis);
        received += 10_000;
        if answer.is_some_and(|at| at <= now) {
            answer = None;
            windows.answered(received, now);
        }
        if windows.wants_ping(received, now) {
            pings += 1;
            windows.asked(received, now);
            answer = Some(now + Duration::from_millis(30));
        }
    }
    assert!((9..20).contains(&pings), "{pings}");
    assert_eq!(windows.change(0, false), None);
    let later = start + Duration::from_secs(3600);
    assert!(!windows.wants_ping(windows.worth - 1, later));
}

#[test]
fn a_path_that_became_longer_is_believed_when_nothing_was_in_the_way() {
    let (mut shortest, start) = (Shortest::default(), Instant::now());
    let (near, far) = (Duration::from_millis(2), Duration::from_millis(80));
    assert_eq!(shortest.heard(near, true, start), near);
    assert_eq!(shortest.heard(far, true, start + Duration::from_secs(10)), near);
    assert_eq!(shortest.heard(far, false, start + TRIPS), near);
    assert_eq!(shortest.heard(far, true, start + TRIPS), far);
    assert_eq!(shortest.heard(near, false, start + TRIPS), near);
}

#[test]
fn a_stream_that_is_dropped_holds_nothing() {
    let traffic = Rc::new(Traffic::default());
    let (mut one, mut other) = (traffic.share(), traffic.share());
    one.received(1000);
    other.received(10);
    one.passed_on(400);
    assert_eq!((traffic.received(), traffic.held()), (1010, 610));
    drop(one);
    assert_eq!((traffic.received(), traffic.held()), (1010, 10));
}

#[test]
fn the_bound_of_a_connection_is_what_its_streams_can_use() {
    assert_eq!(connection_window(1), WINDOW_MAX);
    assert_eq!(connection_window(100), 105 << 20);
    assert_eq!(connection_window(200), 130 << 20);
    assert_eq!(connection_window(u32::MAX), (1 << 31) - 1);
}
