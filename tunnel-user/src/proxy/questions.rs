//! Questions to the workers, from other threads: each is answered on the worker's own thread, between its flows.
//!
//! # Invariants
//! - Nothing of a worker is locked or shared for them: a worker that nobody asks spends nothing.
//! - At most [`QUESTIONS_MAX`] wait at one worker; who asks more gets no answer.

use std::{rc::Rc, sync::Arc};

use tokio::sync::{mpsc, oneshot};

use super::Proxy;
use crate::observe::stats::Counters;

/// The admin interface has a bounded number of requests, each of which asks one question at a time.
pub const QUESTIONS_MAX: usize = 128;

type Question = Box<dyn FnOnce(&Rc<Proxy>) + Send>;

/// One worker's end: the questions that it is to answer.
pub struct Questions(mpsc::Receiver<Question>);

/// One worker, from outside.
#[derive(Clone, Debug)]
pub struct Asked {
    questions: mpsc::Sender<Question>,
    /// What it has counted.
    pub counters: Arc<Counters>,
}

/// Both ends of one worker.
pub fn questions(counters: Arc<Counters>) -> (Asked, Questions) {
    let (questions, answered) = mpsc::channel(QUESTIONS_MAX);
    (Asked { questions, counters }, Questions(answered))
}

impl Questions {
    /// Answers until nobody can ask any more. In the worker's runtime.
    pub async fn answer(mut self, proxy: Rc<Proxy>) {
        while let Some(question) = self.0.recv().await {
            question(&proxy);
        }
    }
}

impl Asked {
    /// Puts a question, whose answer comes from what is returned; it fails when the worker has ended. `None` when it has ended
    /// already, or too many others ask.
    pub fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Rc<Proxy>) -> T + Send + 'static,
    ) -> Option<oneshot::Receiver<T>> {
        let (tell, told) = oneshot::channel();
        let question = move |proxy: &Rc<Proxy>| {
            // Who has asked may have left.
            let _gone = tell.send(question(proxy));
        };
        self.questions.try_send(Box::new(question)).ok()?;
        Some(told)
    }
}
