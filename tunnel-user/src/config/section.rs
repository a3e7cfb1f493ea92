//! `section!`: the one definition of a table of the file.
//!
//! From it come the type, the parser, the JSON schema, the reference of the documentation (which is made of the schema), and
//! the values of what was not said. A key's docs are its description in all of them.
//!
//! ```text
//! section! {
//!     /// `[daemon]`
//!     #[derive(Clone, Debug)]
//!     pub struct Daemon {
//!         /// Worker threads. Default: one per core.
//!         workers: optional NonZeroUsize,
//!         /// Whether this file is read again when it changes.
//!         watch: default bool = true,
//!     }
//!     check |r| { if !watch { r.wrong("watch", "..") } }
//!     defaults new;
//! }
//! ```
//!
//! A field is `NAME: KIND TYPE`, or `NAME as "KEY": KIND TYPE` where the key has another name:
//!
//! | kind | the table | the field |
//! |---|---|---|
//! | `required T` | must have the key | `T` |
//! | `optional T` | may have the key | `Option<T>` |
//! | `default T = VALUE` | may have the key | `T` |
//! | `section T` | may have a table of this name | `T`, by default its `Default` |
//! | `maybe T` | may have a table of this name | `Option<T>` |
//! | `flat T` | has the keys of `T`, itself a section | `T` |
//! | `other T = VALUE` | has no such key | `T`, unless `check` says otherwise |
//!
//! `check` runs when every key has been read, whatever was wrong with some: it sees each field by its name (a `required` one as
//! an `Option`), reports what is wrong with several keys together, and may shadow a field with another value. With
//! `default T [U] = VALUE`, or `optional T [U]`, the key is read as a `U`, of which `check` makes the `T`. `defaults NAME;` adds a constructor that
//! takes the required fields. A bracket in docs is written `\[`, so that rustdoc does not take it for a link.

macro_rules! section {
    (
        $(#[$attr:meta])*
        $vis:vis struct $name:ident {
            $(
                $(#[doc = $doc:literal])+
                $field:ident $(as $key:literal)? : $kind:ident $ty:ty $([$read:ty])? $(= $default:expr)?
            ),+ $(,)?
        }
        check |$r:ident| { $($check:tt)* }
        $(defaults $new:ident;)?
    ) => {
        $(#[$attr])*
        $vis struct $name {
            $($(#[doc = $doc])+ $vis $field: $crate::config::section::section!(@type $kind $ty),)+
        }

        impl $crate::config::reader::Section for $name {
            fn read($r: &mut $crate::config::reader::Reader<'_>) -> Option<Self> {
                $(
                    let $field = $crate::config::section::section!(
                        @read $kind ($ty) ($($read)?) ($($default)?)
                        $r, $crate::config::section::section!(@key $field $($key)?), concat!($($doc),+)
                    );
                    // What `check` replaces may not have been looked at.
                    let _ = &$field;
                )+
                $($check)*
                Some(Self { $($field: $crate::config::section::section!(@value $kind $field),)+ })
            }
        }

        $crate::config::section::section!(
            @defaults ($($new)?) $vis $name $(($kind $field $ty, $($default)?))+
        );
    };

    (@key $field:ident) => { stringify!($field) };
    (@key $field:ident $key:literal) => { $key };

    (@type optional $ty:ty) => { Option<$ty> };
    (@type maybe $ty:ty) => { Option<$ty> };
    (@type $kind:ident $ty:ty) => { $ty };

    (@read required ($ty:ty) () () $r:ident, $key:expr, $doc:expr) => { $r.required::<$ty>($key, $doc) };
    (@read optional ($ty:ty) () () $r:ident, $key:expr, $doc:expr) => { $r.optional::<$ty>($key, $doc) };
    (@read optional ($ty:ty) ($read:ty) () $r:ident, $key:expr, $doc:expr) => {
        $r.optional::<$read>($key, $doc)
    };
    (@read default ($ty:ty) () ($default:expr) $r:ident, $key:expr, $doc:expr) => {
        $r.default::<$ty>($key, $doc, $default)
    };
    (@read default ($ty:ty) ($read:ty) ($default:expr) $r:ident, $key:expr, $doc:expr) => {
        $r.default::<$read>($key, $doc, $default)
    };
    (@read section ($ty:ty) () () $r:ident, $key:expr, $doc:expr) => {
        $r.section::<$ty>($key, $doc).unwrap_or_default()
    };
    (@read maybe ($ty:ty) () () $r:ident, $key:expr, $doc:expr) => { $r.section::<$ty>($key, $doc) };
    (@read flat ($ty:ty) () () $r:ident, $key:expr, $doc:expr) => {
        <$ty as $crate::config::reader::Section>::read($r)
    };
    (@read other ($ty:ty) () ($default:expr) $r:ident, $key:expr, $doc:expr) => {
        std::convert::identity::<$ty>($default)
    };

    (@value required $field:ident) => { $field? };
    (@value flat $field:ident) => { $field? };
    (@value $kind:ident $field:ident) => { $field };

    (@defaults () $vis:vis $name:ident $($fields:tt)*) => {};
    (@defaults ($new:ident) $vis:vis $name:ident $($fields:tt)*) => {
        impl $name {
            $crate::config::section::section!(@new $vis $new [] [] $($fields)*);
        }
    };

    (@new $vis:vis $new:ident [$($arg:tt)*] [$($init:tt)*] (required $field:ident $ty:ty,) $($rest:tt)*) => {
        $crate::config::section::section!(@new $vis $new [$($arg)* $field: $ty,] [$($init)* $field,] $($rest)*);
    };
    (@new $vis:vis $new:ident [$($arg:tt)*] [$($init:tt)*] (optional $field:ident $ty:ty,) $($rest:tt)*) => {
        $crate::config::section::section!(@new $vis $new [$($arg)*] [$($init)* $field: None,] $($rest)*);
    };
    (@new $vis:vis $new:ident [$($arg:tt)*] [$($init:tt)*] (maybe $field:ident $ty:ty,) $($rest:tt)*) => {
        $crate::config::section::section!(@new $vis $new [$($arg)*] [$($init)* $field: None,] $($rest)*);
    };
    (@new $vis:vis $new:ident [$($arg:tt)*] [$($init:tt)*] (section $field:ident $ty:ty,) $($rest:tt)*) => {
        $crate::config::section::section!(@new $vis $new [$($arg)*] [$($init)* $field: Default::default(),] $($rest)*);
    };
    (@new $vis:vis $new:ident [$($arg:tt)*] [$($init:tt)*] (flat $field:ident $ty:ty,) $($rest:tt)*) => {
        $crate::config::section::section!(@new $vis $new [$($arg)*] [$($init)* $field: Default::default(),] $($rest)*);
    };
    (@new $vis:vis $new:ident [$($arg:tt)*] [$($init:tt)*]
        ($kind:ident $field:ident $ty:ty, $default:expr) $($rest:tt)*) => {
        $crate::config::section::section!(@new $vis $new [$($arg)*] [$($init)* $field: $default,] $($rest)*);
    };
    (@new $vis:vis $new:ident [$($arg:tt)*] [$($init:tt)*]) => {
        /// Where nothing is said but what has no default.
        $vis fn $new($($arg)*) -> Self {
            Self { $($init)* }
        }
    };
}

pub(crate) use section;
