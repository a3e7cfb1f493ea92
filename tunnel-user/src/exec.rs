//! `tunnel exec`: one command, captured.
