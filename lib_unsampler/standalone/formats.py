"""Which picture files are read, by Pillow's names of their formats. Standard library only."""

from __future__ import annotations

READ: dict[str, tuple[str, ...]] = {
    "AVIF": (".avif", ".avifs"),
    "BLP": (".blp",),
    "BMP": (".bmp",),
    "CUR": (".cur",),
    "DCX": (".dcx",),
    "DDS": (".dds",),
    "DIB": (".dib",),
    "FITS": (".fit", ".fits"),
    "FLI": (".fli", ".flc"),
    "FTEX": (".ftc", ".ftu"),
    "GBR": (".gbr",),
    "GIF": (".gif",),
    "HEIF": (".heic", ".heif"),
    "ICNS": (".icns",),
    "ICO": (".ico",),
    "IM": (".im",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "JXL": (".jxl",),
    "MPO": (".mpo",),
    "MSP": (".msp",),
    "PCX": (".pcx",),
    "PIXAR": (".pxr",),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "PSD": (".psd",),
    "QOI": (".qoi",),
    "SGI": (".sgi", ".rgb", ".rgba", ".bw"),
    "SPIDER": (".spi",),
    "SUN": (".ras",),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "XBM": (".xbm",),
    "XPM": (".xpm",),
}
"""The formats that are read, each with the endings by which a folder's pictures are known."""

REFUSED = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "FPX", "MIC")
"""Formats that Pillow hands to another program or library (Ghostscript, ...), or only recognises."""

PLUGINS = {"JXL": "pillow_jxl", "HEIF": "pillow_heif"}
"""Packages that teach Pillow a format, used where they are installed."""

ENDINGS = tuple(ending for endings in READ.values() for ending in endings)
