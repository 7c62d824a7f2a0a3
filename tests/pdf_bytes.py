"""Small PDFs written by hand for tests: pages of text, of nothing, of a picture, or of a font that maps to nothing."""

from __future__ import annotations

import io

PICTURE = "q 200 0 0 200 72 500 cm /Im1 Do Q"  # a page's content that paints the picture alone


def text_page(*lines: str) -> str:
    """A page's content with `lines` one below the other; only ASCII without brackets and backslashes."""
    return "BT /F1 12 Tf 72 720 Td 14 TL " + " ".join(f"({line}) Tj T*" for line in lines) + " ET"


def pdf(*pages: str) -> bytes:
    """A PDF 1.4 whose pages have these content streams. F1 is Helvetica, Im1 a grey pixel."""
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Count {len(pages)} /Kids [{' '.join(f'{5 + 2 * i} 0 R' for i in range(len(pages)))}] >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
        _stream("G", "/Type /XObject /Subtype /Image /Width 1 /Height 1 /ColorSpace /DeviceGray /BitsPerComponent 8"),
    ]
    resources = "/Resources << /Font << /F1 3 0 R >> /XObject << /Im1 4 0 R >> >>"
    for i, content in enumerate(pages):
        objects.append(f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] {resources} /Contents {6 + 2 * i} 0 R >>")
        objects.append(_stream(content))
    out = io.BytesIO(b"%PDF-1.4\n")
    out.seek(0, io.SEEK_END)
    places = []
    for number, body in enumerate(objects, 1):
        places.append(out.tell())
        out.write(f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1"))
    table = out.tell()
    out.write(f"xref\n0 {len(places) + 1}\n0000000000 65535 f \n".encode())
    out.write(b"".join(b"%010d 00000 n \n" % place for place in places))
    out.write(f"trailer << /Size {len(places) + 1} /Root 1 0 R >>\nstartxref\n{table}\n%%EOF\n".encode())
    return out.getvalue()


def encrypted(data: bytes, user: str, owner: str = "owner") -> bytes:
    """The same under RC4; with an empty `user` password it opens without one."""
    import pypdf

    writer = pypdf.PdfWriter(clone_from=io.BytesIO(data))
    writer.encrypt(user, owner, algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def _stream(content: str, entries: str = "") -> str:
    return f"<< {entries} /Length {len(content)} >>\nstream\n{content}\nendstream"
