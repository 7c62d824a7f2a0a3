"""Small PDFs written by hand for tests: pages of text, of nothing, of a picture, or of a font that maps to nothing."""

from __future__ import annotations

import base64
import io
import zlib

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


def aes_encrypted() -> bytes:
    """A page that says "a secret" under AES-256, made by pypdf with cryptography; it opens without a password."""
    return zlib.decompress(base64.b85decode(_AES))


_AES = (
    "c-oCr&5ImG6u-nn`rttkPlmeeMKs;@T?LcH-Pu`p)nt|(-3YQseZ1Q3u+u&E^sd<;dN9O`ABg0jVlbXW5l`Yp40sU*F(4B45{(D-FEFA9t9w"
    "5(WIQ-?srTyr-uu1RzgIIW3yTlp<20GM@$0wWB^YI>v}ck|CrKaQ9RW(arZ!vUMv|_W4HzR516GsS*#rvT1d=I08<(Wra=WMzPSQtnKSoa>+"
    "5pk|1eE?Kv?)|Ugzi;JPlC_Qe0ese$l_mMf}|!fQMwA_a=UVoRFh$`jF|R-5j!B6KH0Zt!0lZu4>95gH_c@?LSm&c61O$QrkFL^lXS3c>(*?"
    "Xv9)<KhPH0H1Y0{$=guT)uW+T$iw%^X&WpKXoF6zQ3h=1{`$Q*dEDzghoX&l{+01bX@{P@QqTO<<tOg_FV$=fc<PILL%x<KU*W(qay5(?G7R"
    "?A%l0F8-M#NLnR3FzBm|=3_`qP&$j*tI*`KPb{`QzFL7w$f?v+&IJ&DXB{FnasP?_d0|VYwf=&sR+F-Os49iHr|jUHWpp>K(oG&WZW+@Ba4e"
    "sn72n9645xk6pe0?=LRi_020^eRjuvy88XX8+X3`(fc>f|MKU1S8nE)K5-w<zj?Io|8?rEPoI0_)q7re{(+YV*IrsXH_bp!Fjzx8etjekxey"
    "-DD~J)zw2(xTsDgZ}h6<&F+7#YYK1utiqpb!VymOdoYlLK&1s=R2*kQ^u!;MuUkPN)QoH=HtFx*OoHN)N*#t4Uu2ui^z#WfJm1&Cm?jEPKnh"
    "?;r=bp#0*3)(=Wr{FV!fm#TZTkj!=3~*3{Vx?J7Ay|)zGMIBI7{?+Q?v1C$2<E8E1T{E-R0M<qL$S1?QSM@^=t1rGPjlP#W^bqY=IKJ|`XeZ"
    "sppz(_>kZcEZ8B)IKd6U`XfHuyRJV+N4|Svv;EXhp8H;Uaj5v*5r0KY~Uc_cOcA5eu+QbHgmD*^kaIj7}g=I5{m`26ModBzhwa&+;KvU1N*f"
    "DoB%M=y>7~)u6uoio+SYXyW0D`@vJj66n&%?Oj4m@@yW0FV+3LK*(P_3esQLDL}omj536@(;<;?E9$NN`R$3h2;>;|jJn#Vwy;Q$9@Sl#fU`"
    "<)d;M%Xv2C6KcX&S0>+rs@3!$KL^deu9juo@x7;Sc_BV}9Ts(|tWh9*RGbZgX(BOZ-e4UKI{SY@*4uZf+8xzM9z1sA+EjHrtk@+_W@dW*#pG"
    "W!Yrq8"
)
