//! The terminal that `tunnel top` has to itself: raw, with a screen of its own, and what is typed.

use std::io;

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

/// What is typed next; none where nobody can type any more.
pub(super) fn typed() -> Option<Typed> {
    loop {
        match event::read().ok()? {
            // A key that is let go says nothing.
            Event::Key(key) if key.kind == KeyEventKind::Release => {}
            Event::Key(key) => return Some(Typed::Key(key)),
            Event::Resize(..) => return Some(Typed::Resized),
            _ => {}
        }
    }
}

/// The terminal. Dropped, it is as it was before.
pub(super) struct Screen {
    terminal: Terminal<CrosstermBackend<io::Stdout>>,
    look: Look,
}

impl Screen {
    /// Takes the terminal.
    pub(super) fn open() -> io::Result<Self> {
        enable_raw_mode()?;
        // From here on it is put back, whatever fails.
        let restoring = Restoring;
        execute!(io::stdout(), EnterAlternateScreen, cursor::Hide)?;
        let terminal = Terminal::new(CrosstermBackend::new(io::stdout()))?;
        std::mem::forget(restoring);
        Ok(Self { terminal, look: Look::of_environment() })
    }

    /// Shows it.
    pub(super) fn draw(&mut self, model: &mut Model) -> io::Result<()> {
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
        // A terminal that is gone needs nothing.
        let _gone = execute!(io::stdout(), LeaveAlternateScreen, cursor::Show);
        let _gone = disable_raw_mode();
    }
}
