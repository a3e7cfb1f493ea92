//! The `tunnel` program: parses the command line, calls the library, and turns the result into an exit code.
//!
//! A failure is printed once, with its remedy. The rooms that must not know each other are wired together here.

#![forbid(unsafe_code)]

use std::{
    io::{self, IsTerminal as _, Write as _},
    process::ExitCode,
};

use clap::{CommandFactory as _, Parser as _};
use tunnel::{
    cli::{
        Cli, Command, CompletionsArgs, ConfigCommand, ManArgs, PkiCommand, attach, doctor, exec, explain,
        flows, pki, service, status, support, top,
    },
    config::{Config, schema},
    daemon::{self, Running},
    identity::configured::check,
    kernel::cgroup::Fresh,
    observe::{stats::Record, telemetry},
    process::{
        exit::{Cause, EXIT_CONFIG, EXIT_OTHER, Failure},
        panics,
    },
};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // A failure to print the failure cannot be reported anywhere.
            let _ = e.print();
            return if e.use_stderr() { ExitCode::from(EXIT_CONFIG) } else { ExitCode::SUCCESS };
        }
    };
    let logging = telemetry::init(&cli.log_filter(), cli.log_format);
    panics::install();
    dispatch(cli.command).unwrap_or_else(|failure| {
        logging.say(&format!("tunnel: {failure}\n"));
        ExitCode::from(&failure)
    })
}

fn dispatch(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Exec(args) => {
            let config = args.to_config()?;
            let options =
                exec::Options { command: args.command, stats: args.stats, stats_json: args.stats_json };
            exec::run::<Daemon>(config, &options)
        }
        Command::Run(args) => {
            let (config, service) = (Config::load(&args.config)?, service::read()?);
            daemon::run(config, Some(&args.config), args.takeover, service).map(|()| ExitCode::SUCCESS)
        }
        Command::Gateway(args) => {
            daemon::run(args.to_config(), None, false, service::read()?).map(|()| ExitCode::SUCCESS)
        }
        Command::Attach(args) => print(attach::attach(&args)?.as_bytes()),
        Command::Detach(args) if args.group.is_said() => {
            print(attach::detach(&args.daemon, &args.group)?.as_bytes())
        }
        Command::Detach(args) => {
            // One of them is required.
            let file = args.daemon.config.unwrap_or_default();
            daemon::detach(&Config::load_to_detach(&file)?).map(|()| ExitCode::SUCCESS)
        }
        Command::Status(args) => {
            let (text, ready) = status::run(&args)?;
            print(text.as_bytes())?;
            Ok(if ready { ExitCode::SUCCESS } else { ExitCode::from(EXIT_OTHER) })
        }
        Command::Flows(args) => flows::run(&args, io::stdout()).map(|()| ExitCode::SUCCESS),
        Command::Top(args) => print(top::run(&args)?.as_bytes()),
        Command::Explain(args) => print(explain::run(&args)?.as_bytes()),
        Command::Support(args) => {
            let (folder, missing) = support::run(&args)?;
            for what in missing {
                eprintln!("tunnel: not in the report: {what}");
            }
            print(format!("{}\n", folder.display()).as_bytes())
        }
        Command::Doctor(args) => diagnose(args.json),
        Command::Config(command) => config(command),
        Command::Pki(command) => issue(command),
        Command::Completions(CompletionsArgs { shell }) => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "tunnel", &mut script);
            print(&script)
        }
        Command::Man(args) => man(args),
    }
}

/// The daemon of `tunnel exec`.
struct Daemon(Running);

impl exec::Carrier for Daemon {
    fn require_privileges() -> Result<(), Failure> {
        daemon::require_for_capture()
    }

    fn start(config: Config, group: &Fresh, keep_records: bool) -> Result<Self, Failure> {
        let options = daemon::Options { group: Some(group), keep_records, ..daemon::Options::default() };
        daemon::start(config, options).map(Self)
    }

    async fn run(&mut self) {
        self.0.watch_captures().await;
    }

    fn look_for_leavers(&mut self) {
        self.0.look_for_leavers();
    }

    fn stop(self) -> (Vec<Record>, u64) {
        let report = self.0.stop();
        (report.records, report.dropped)
    }
}

fn diagnose(as_json: bool) -> Result<ExitCode, Failure> {
    let findings = doctor::examine();
    let text =
        if as_json { doctor::json(&findings) } else { doctor::text(&findings, io::stdout().is_terminal()) };
    print(text.as_bytes())?;
    Ok(ExitCode::from(doctor::exit_code(&findings)))
}

fn config(command: ConfigCommand) -> Result<ExitCode, Failure> {
    match command {
        ConfigCommand::Check { file } => {
            let config = Config::load(&file)?;
            let keys: Vec<_> = config.identities.values().map(check).collect::<Result<_, _>>()?;
            config.warnings.iter().for_each(|warning| eprintln!("{warning} (warning)"));
            for warning in keys.into_iter().flatten().chain(daemon::nested(&config)) {
                eprintln!("{}: warning: {warning}", file.display());
            }
            print(format!("{}: no mistakes\n", file.display()).as_bytes())
        }
        ConfigCommand::Schema => print(format!("{:#}\n", schema()).as_bytes()),
    }
}

fn issue(command: PkiCommand) -> Result<ExitCode, Failure> {
    let files = match command {
        PkiCommand::Init { dir, force } => pki::init(&dir, force)?,
        PkiCommand::Issue(args) => pki::issue(&args.dir, &args.name, &args.to_request(), args.force)?,
    };
    print(format!("{}\n{}\n", files.cert.display(), files.key.display()).as_bytes())
}

fn man(args: ManArgs) -> Result<ExitCode, Failure> {
    let failed = |e: io::Error| Failure::Other(Cause::new(format!("cannot write the manual page: {e}"), ""));
    if let Some(dir) = args.dir {
        std::fs::create_dir_all(&dir).map_err(failed)?;
        clap_mangen::generate_to(Cli::command(), dir).map_err(failed)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(Cli::command()).render(&mut page).map_err(failed)?;
    print(&page)
}

/// A reader that has closed the pipe (`tunnel config schema | head`) is not an error.
fn print(bytes: &[u8]) -> Result<ExitCode, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::Other(Cause::new(format!("standard output: {e}"), "")))
        }
        _ => Ok(ExitCode::SUCCESS),
    }
}
