//! How far a benchmark is, on stderr: a bar with the time that is left, or a line every few seconds where it is no terminal.
//!
//! A note is always written, and above the bar. A closed stderr stops no benchmark.

use std::{
    fmt,
    io::{self, IsTerminal as _, Write},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use super::{
    number::duration,
    words::{count, plain},
};

/// Lines into a log come no faster: enough to see that it lives, few enough to read later.
const EVERY: Duration = Duration::from_secs(5);

/// A display of progress; dropping it leaves the terminal as it should be.
pub struct Progress {
    bar: ProgressBar,
    state: Mutex<State>,
}

struct State {
    /// How many there are.
    steps: u64,
    /// How many have begun.
    begun: u64,
    title: String,
    /// Where lines go when there is no terminal.
    lines: Option<Lines>,
}

struct Lines {
    out: Box<dyn Write + Send>,
    begin: Instant,
    last: Option<Instant>,
}

impl Progress {
    /// For this many steps over all scenarios.
    pub fn new(steps: u64) -> Self {
        let stderr = io::stderr();
        if !stderr.is_terminal() {
            return Self::lines(steps, Box::new(stderr), Instant::now());
        }
        let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
        let style = "{bar:16} {pos}/{len} {percent:>3} %{times}  {prefix:.bold} {wide_msg}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            let style = style.with_key("times", |state: &ProgressState, out: &mut dyn fmt::Write| {
                let steps = state.len().unwrap_or(0);
                // What fails to be written is a frame of a bar.
                let _ = write!(out, ", {}", times(state.elapsed().as_secs_f64(), state.pos(), steps));
            });
            bar.set_style(style.progress_chars("━╸─"));
        }
        // The clock goes on during a step, which takes seconds.
        bar.enable_steady_tick(Duration::from_millis(500));
        Self { bar, state: Mutex::new(State { steps, begun: 0, title: String::new(), lines: None }) }
    }

    fn lines(steps: u64, out: Box<dyn Write + Send>, begin: Instant) -> Self {
        let lines = Some(Lines { out, begin, last: None });
        let state = Mutex::new(State { steps, begun: 0, title: String::new(), lines });
        Self { bar: ProgressBar::hidden(), state }
    }

    /// A scenario of this many steps begins.
    pub fn scenario(&self, title: &str, steps: u64) {
        let mut state = self.state();
        state.title = plain(title);
        self.bar.set_prefix(state.title.clone());
        let text = format!("{}: {}", state.title, count(steps, "step"));
        state.line(Instant::now(), true, &text);
    }

    /// A step begins, which ends the one before: `ours, connect:1, round 3 of 11`.
    pub fn step(&self, what: &str) {
        let mut state = self.state();
        self.bar.set_position(state.begun.min(state.steps));
        state.begun += 1;
        let what = plain(what);
        let text = if state.title.is_empty() { what.clone() } else { format!("{}: {what}", state.title) };
        self.bar.set_message(what);
        state.line(Instant::now(), false, &text);
    }

    /// Says something that stays.
    pub fn note(&self, text: &str) {
        let text = plain(text);
        let mut state = self.state();
        match &mut state.lines {
            Some(lines) => lines.write(&text),
            None => self.bar.println(text),
        }
    }

    /// All is done; the bar goes away.
    pub fn finish(&self) {
        let mut state = self.state();
        state.title.clear();
        let text = format!("done: {}", count(state.begun, "step"));
        if state.lines.is_some() {
            state.line(Instant::now(), true, &text);
        }
        self.bar.finish_and_clear();
    }

    /// A panic of another thread in here has broken nothing worth a second one.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

impl State {
    /// Writes a line unless one has just been written.
    fn line(&mut self, now: Instant, always: bool, text: &str) {
        let (steps, done) = (self.steps, self.begun.saturating_sub(1));
        let Some(lines) = &mut self.lines else { return };
        if !always && lines.last.is_some_and(|last| now.duration_since(last) < EVERY) {
            return;
        }
        lines.last = Some(now);
        let gone = now.duration_since(lines.begin).as_secs_f64();
        lines.write(&format!("[{}/{steps}, {}] {text}", self.begun, times(gone, done, steps)));
    }
}

/// `12 min, 34 min left`: what is left has the same workloads in it as what is done, round after round, so
/// that the average of all steps says more than the latest ones.
fn times(gone: f64, done: u64, steps: u64) -> String {
    if done == 0 {
        return duration(gone);
    }
    let left = gone / done as f64 * steps.saturating_sub(done) as f64;
    format!("{}, {} left", duration(gone), duration(left))
}

impl Lines {
    fn write(&mut self, text: &str) {
        // Nobody reads it any more: the benchmark goes on.
        let _ = writeln!(self.out, "{text}");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Shared {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    #[test]
    fn without_a_terminal_steps_are_few_lines_and_notes_are_all_there() {
        let out = Shared::default();
        let begin = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
        let progress = Progress::lines(120, Box::new(out.clone()), begin);
        progress.scenario("The whole way", 120);
        for round in 0..60 {
            progress.step(&format!("round {round}"));
            progress.note(&format!("note {round}\x1b[2J"));
        }
        progress.state().line(Instant::now() + EVERY, false, "later");
        progress.finish();
        let text = out.text();
        assert_eq!(text.matches("note ").count(), 60, "{text}");
        assert!(!text.contains('\x1b') && !text.contains("round 7"), "{text}");
        assert!(text.starts_with("[0/120, 1 min] The whole way: 120 steps\n"), "{text}");
        assert!(text.contains("[60/120, 1 min, 1 min left] later\n"), "{text}");
        assert!(text.ends_with("done: 60 steps\n"), "{text}");
    }
}
