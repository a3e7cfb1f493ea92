//! The terminal that `tunnel top` has to itself: raw, with a screen of its own, and what is typed.

use std::{
    io, panic,
    sync::atomic::{AtomicBool, Ordering},
};

use crossterm::{
    cursor,
    event::{self, Event, KeyEvent, KeyEventKind},
    execute,
    terminal::{EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode},
};
use ratatui_core::terminal::Terminal;
use ratatui_crossterm::CrosstermBackend;

use super::{
    model::Model,
    screen::{self, Look},
};

/// Something that is typed, or that changes what is seen.
#[derive(Clone, Copy, Debug)]
pub(super) enum Typed {
    Key(KeyEvent),
    Resized,
}

/// What is typed next; an error where nobody can type any more.
pub(super) fn typed() -> io::Result<Typed> {
    loop {
        match event::read()? {
            // A key that is let go says nothing.
            Event::Key(key) if key.kind == KeyEventKind::Release => {}
            Event::Key(key) => return Ok(Typed::Key(key)),
            Event::Resize(..) => return Ok(Typed::Resized),
            _ => {}
        }
    }
}

/// Whether it is not as it was before.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// The terminal. Dropped, it is as it was before.
pub(super) struct Screen {
    terminal: Terminal<CrosstermBackend<io::Stdout>>,
    look: Look,
}

impl Screen {
    /// Takes the terminal.
    pub(super) fn open() -> io::Result<Self> {
        enable_raw_mode()?;
        TAKEN.store(true, Ordering::Relaxed);
        // From here on it is put back, whatever fails.
        let restoring = Restoring;
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            // What is said of a panic of any thread is to be seen.
            restore();
            before(panic);
        }));
        execute!(io::stdout(), EnterAlternateScreen, cursor::Hide)?;
        let terminal = Terminal::new(CrosstermBackend::new(io::stdout()))?;
        std::mem::forget(restoring);
        Ok(Self { terminal, look: Look::of_environment() })
    }

    /// Shows it.
    pub(super) fn draw(&mut self, model: &mut Model) -> io::Result<()> {
        if !TAKEN.load(Ordering::Relaxed) {
            return Err(io::Error::other("a thread of this program panicked"));
        }
        self.terminal.draw(|frame| screen::draw(frame, model, self.look)).map(drop)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        drop(Restoring);
    }
}

struct Restoring;

impl Drop for Restoring {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts it back, once.
fn restore() {
    if TAKEN.swap(false, Ordering::Relaxed) {
        // A terminal that is gone needs nothing.
        let _gone = execute!(io::stdout(), LeaveAlternateScreen, cursor::Show);
        let _gone = disable_raw_mode();
    }
}
