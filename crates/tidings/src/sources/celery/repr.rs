//! Which project a call names, read from the text that Celery's events carry of its arguments.
//!
//! That text is `saferepr(kwargs, 1024)`: written to be looked at, not to be read back. It escapes `'` but not `\`, writes
//! bytes as they are, prints objects as they print themselves, and is cut. So only what cannot have come from anything
//! else is taken for an answer:
//!
//! - **The first argument**, whatever follows it: nothing stands before it that could have been written to look like it.
//! - **Any other**, if all of the text is plain, nothing was cut, and every key of that name, also in nested dictionaries,
//!   has the same value. The real one is then among those: within a string, the first quote of its name would end
//!   that string, where only a separator may follow. So nothing else, however it prints itself, is taken for it.
//! - **By position**, if everything up to there is plain.
//!
//! Plain are strings without a backslash, numbers and names, UUIDs, and lists, tuples and dictionaries of plain values.
//!
//! What no reading can find out: an object that prints itself as several arguments (`1, 'project_id': 'p-2'`) in a call
//! that has no such argument, or before a position. Whoever has a class that prints the text of users as it is, and such
//! calls, must switch this off. It never decides about rights. What the id of a project may be, it does not know.

/// How deep containers may be nested. Celery hides what is below the third level unless it is told otherwise; this bounds
/// our stack for whatever else comes.
const DEPTH_MAX: usize = 16;

/// The value of the keyword argument `argument`, if the text of the keyword arguments leaves no doubt about it.
pub(super) fn project_in(repr: &str, argument: &str) -> Option<String> {
    match Reader::whole(repr, argument) {
        Some(seen) => {
            let mut on_top = seen.iter().filter(|(depth, _)| *depth == 1);
            let (_, value) = on_top.next()?;
            let unanimous = on_top.next().is_none() && seen.iter().all(|(_, other)| other == value);
            if unanimous { value.plain() } else { None }
        }
        None => Reader::new(repr, argument).first(),
    }
}

/// The positional argument at `index`, from 0, if the text of the positional arguments leaves no doubt about it.
pub(super) fn positional_in(repr: &str, index: usize) -> Option<String> {
    let mut reader = Reader::new(repr, "");
    let container = reader.open()?;
    if container == Container::Dict {
        return None;
    }
    for _ in 0..index {
        reader.item(1)?;
        reader.take(", ")?;
    }
    let value = reader.item(1)?;
    reader.at_end_of_item(container)?;
    value.plain()
}

#[derive(Clone, Copy, PartialEq)]
enum Container {
    Dict,
    List,
    Tuple,
}

impl Container {
    /// A tuple of one ends in a comma.
    fn ends(self) -> &'static [&'static str] {
        match self {
            Self::Dict => &["}"],
            Self::List => &["]"],
            Self::Tuple => &[")", ",)"],
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Item<'a> {
    Quoted(&'a str),
    Bare(&'a str),
    Uuid(&'a str),
    Nested,
}

impl Item<'_> {
    /// The value as text, if it can be an id and is all there.
    fn plain(self) -> Option<String> {
        match self {
            // It may be the beginning of a longer one.
            Self::Quoted(text) if text.ends_with("...") => None,
            Self::Quoted(text) | Self::Uuid(text) => Some(text.to_owned()),
            Self::Bare(text) if is_integer(text) => Some(text.to_owned()),
            Self::Bare(_) | Self::Nested => None,
        }
    }
}

/// What is left to read. A `None` where something is required ends the reading: it is not plain.
struct Reader<'a> {
    rest: &'a str,
    argument: &'a str,
    /// Depth and value of each key that is called like the argument.
    seen: Vec<(usize, Item<'a>)>,
}

impl<'a> Reader<'a> {
    fn new(repr: &'a str, argument: &'a str) -> Self {
        Self { rest: repr, argument, seen: Vec::new() }
    }

    fn whole(repr: &'a str, argument: &'a str) -> Option<Vec<(usize, Item<'a>)>> {
        let mut reader = Self::new(repr, argument);
        if reader.open()? != Container::Dict {
            return None;
        }
        reader.rest_of(Container::Dict, 1)?;
        reader.rest.is_empty().then_some(reader.seen)
    }

    fn first(mut self) -> Option<String> {
        self.take("{")?;
        if self.item(1)? != Item::Quoted(self.argument) {
            return None;
        }
        self.take(": ")?;
        let value = self.item(1)?;
        self.at_end_of_item(Container::Dict)?;
        value.plain()
    }

    fn at_end_of_item(&self, container: Container) -> Option<()> {
        let ends = self.rest.starts_with(", ") || container.ends().contains(&self.rest);
        ends.then_some(())
    }

    fn open(&mut self) -> Option<Container> {
        let container = match self.rest.as_bytes().first()? {
            b'{' => Container::Dict,
            b'[' => Container::List,
            b'(' => Container::Tuple,
            _ => return None,
        };
        self.rest = &self.rest[1..];
        Some(container)
    }

    /// Everything behind a container's opening, with its end.
    fn rest_of(&mut self, container: Container, depth: usize) -> Option<()> {
        if depth > DEPTH_MAX {
            return None;
        }
        // Hidden because too deep. An ellipsis behind an item stands for a cut, and is no item.
        let hidden = self.take("...").is_some();
        if self.close(container).is_some() {
            return Some(());
        }
        if hidden {
            return None;
        }
        loop {
            let item = self.item(depth)?;
            if container == Container::Dict {
                self.take(": ")?;
                let value = self.item(depth)?;
                if item == Item::Quoted(self.argument) {
                    self.seen.push((depth, value));
                }
            }
            if self.close(container).is_some() {
                return Some(());
            }
            self.take(", ")?;
        }
    }

    fn close(&mut self, container: Container) -> Option<()> {
        container.ends().iter().find_map(|end| self.take(end))
    }

    fn item(&mut self, depth: usize) -> Option<Item<'a>> {
        if let Some(container) = self.open() {
            self.rest_of(container, depth + 1)?;
            return Some(Item::Nested);
        }
        if self.take("'").is_some() {
            return self.rest_of_quoted().map(Item::Quoted);
        }
        if self.take("UUID('").is_some() {
            let text = self.rest_of_quoted().filter(|text| is_uuid(text))?;
            self.take(")")?;
            return Some(Item::Uuid(text));
        }
        self.bare().map(Item::Bare)
    }

    /// Up to the closing quote. With a backslash nobody knows which one that is: `'\'` is a backslash, or begins with a
    /// quote.
    fn rest_of_quoted(&mut self) -> Option<&'a str> {
        let (text, rest) = self.rest.split_once('\'')?;
        self.rest = rest;
        (!text.contains('\\')).then_some(text)
    }

    fn bare(&mut self) -> Option<&'a str> {
        let is_bare = |c: char| c.is_ascii_alphanumeric() || "_.+-".contains(c);
        let end = self.rest.find(|c| !is_bare(c)).unwrap_or(self.rest.len());
        let (text, rest) = self.rest.split_at(end);
        self.rest = rest;
        (!text.is_empty() && !text.contains("...")).then_some(text)
    }

    fn take(&mut self, text: &str) -> Option<()> {
        self.rest = self.rest.strip_prefix(text)?;
        Some(())
    }
}

/// As Python prints integers.
fn is_integer(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let canonical = text == "0" || !digits.starts_with('0');
    canonical && !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// As Python prints UUIDs.
fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
        })
}

#[cfg(test)]
mod tests;
