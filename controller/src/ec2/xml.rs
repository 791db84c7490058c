//! Writing XML: elements in order, text escaped. The one place where a byte of an answer is made.

use quick_xml::escape::minimal_escape;

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
        self.element(name, |xml| xml.out.push_str(&minimal_escape(text)));
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
