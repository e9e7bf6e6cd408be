"Build from settings.ini, the one place where names, version and requirements are kept."
import shlex
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='])
ini.read('settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
spdx = dict(apache2='Apache-2.0', mit='MIT', bsd3='BSD-3-Clause')

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    author=cfg['author'], author_email=cfg['author_email'], keywords=cfg['keywords'].split(),
    license=spdx[cfg['license']], url=cfg['git_url'],
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research', 'Intended Audience :: Education',
                 'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Medical Science Apps.'],
    project_urls=dict(Source=cfg['git_url']),
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path']+'.*']), include_package_data=True, zip_safe=False,
    python_requires='>='+cfg['min_python'],
    install_requires=shlex.split(cfg.get('requirements','')),
    extras_require={key.removesuffix('_requirements'): shlex.split(value) for key, value in cfg.items() if key.endswith('_requirements')},
    entry_points=dict(console_scripts=shlex.split(cfg.get('console_scripts','')), nbdev=[f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]),
)
