//! Writing XML: elements in order, text escaped. The one place where a byte of an answer is made.

use quick_xml::escape::partial_escape;

/// An XML document being written.
pub struct Writer {
    out: String,
}

impl Writer {
    /// Starts with the XML declaration.
    pub fn new() -> Writer {
        Writer { out: String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n") }
    }

    /// `<name>…</name>`, or `<name/>` when `content` writes nothing.
    pub fn element(&mut self, name: &str, content: impl FnOnce(&mut Writer)) {
        self.out.push('<');
        self.out.push_str(name);
        self.finish_element(name, content);
    }

    /// The same with a namespace: `<name xmlns="…">`.
    pub fn element_in(&mut self, name: &str, namespace: &str, content: impl FnOnce(&mut Writer)) {
        self.out.push('<');
        self.out.push_str(name);
        self.out.push_str(" xmlns=\"");
        self.out.push_str(&quick_xml::escape::escape(namespace));
        self.out.push('"');
        self.finish_element(name, content);
    }

    fn finish_element(&mut self, name: &str, content: impl FnOnce(&mut Writer)) {
        self.out.push('>');
        let start = self.out.len();
        content(self);
        if self.out.len() == start {
            // Nothing inside: the empty-element tag that EC2 writes for an empty list.
            self.out.pop();
            self.out.push_str("/>");
        } else {
            self.out.push_str("</");
            self.out.push_str(name);
            self.out.push('>');
        }
    }

    /// `<name>text</name>`, escaped.
    pub fn text(&mut self, name: &str, text: &str) {
        self.element(name, |xml| text.write_content(xml));
    }

    pub fn finish(self) -> String {
        self.out
    }
}

impl Default for Writer {
    fn default() -> Writer {
        Writer::new()
    }
}

/// A type that writes itself into an answer.
pub trait WriteXml {
    /// What stands between the start and the end of the element that holds it.
    fn write_content(&self, xml: &mut Writer);
}

impl Writer {
    pub fn value(&mut self, name: &str, value: &impl WriteXml) {
        self.element(name, |xml| value.write_content(xml));
    }

    /// Nothing when there is no value.
    pub fn optional<T: WriteXml>(&mut self, name: &str, value: Option<&T>) {
        if let Some(value) = value {
            self.value(name, value);
        }
    }

    /// `<name><item>…</item>…</name>`; nothing when there is no list, `<name/>` when it is empty.
    pub fn list<T: WriteXml>(&mut self, name: &str, item: &str, values: Option<&Vec<T>>) {
        if let Some(values) = values {
            self.element(name, |xml| values.iter().for_each(|value| xml.value(item, value)));
        }
    }
}

impl WriteXml for str {
    /// `>` is escaped too, for `]]>` may not stand in a text (XML 1.0, section 2.4). A carriage return
    /// is written as a reference: a reader would take the letter for a line feed (section 2.11).
    fn write_content(&self, xml: &mut Writer) {
        xml.out.push_str(&partial_escape(self).replace('\r', "&#13;"));
    }
}

impl WriteXml for String {
    fn write_content(&self, xml: &mut Writer) {
        self.as_str().write_content(xml);
    }
}

/// Their `Display` is the form of XML Schema, which EC2 uses.
macro_rules! displayed {
    ($($kind:ty),*) => {$(
        impl WriteXml for $kind {
            fn write_content(&self, xml: &mut Writer) {
                xml.out.push_str(&self.to_string());
            }
        }
    )*};
}

displayed!(bool, i32, i64, f32, f64);

impl WriteXml for super::Blob {
    fn write_content(&self, xml: &mut Writer) {
        use base64::Engine as _;
        xml.out.push_str(&base64::engine::general_purpose::STANDARD.encode(&self.0));
    }
}

impl WriteXml for time::OffsetDateTime {
    /// With milliseconds, in UTC, as EC2 writes it: `2026-11-22T08:00:00.000Z`.
    fn write_content(&self, xml: &mut Writer) {
        let t = self.to_offset(time::UtcOffset::UTC);
        xml.out.push_str(&format!(
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z",
            t.year(),
            u8::from(t.month()),
            t.day(),
            t.hour(),
            t.minute(),
            t.second(),
            t.millisecond()
        ));
    }
}
